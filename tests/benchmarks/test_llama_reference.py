"""What the comparison with llama.cpp computes itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import llama_cpp, llama_reference
from jaxquant import demo

from ..demo import llamas


def test_errors_are_relative_and_ignore_what_all_logits_share(capsys):
    random = np.random.default_rng(0)
    wanted = [random.normal(size=(4, 7)) for _ in range(2)]
    found = [w + random.normal(size=(4, 1)) for w in wanted]
    result = llama_reference.compare("shifted", found, iter(wanted))
    assert result == {"error": pytest.approx(0, abs=1e-12), "agreement": 1}
    centered = [w - w.mean(1, keepdims=True) for w in wanted]
    result = llama_reference.compare("larger", [1.5 * c for c in centered], iter(wanted))
    assert result["error"] == pytest.approx(0.5)
    turned = [wanted[0], -wanted[1]]
    assert llama_reference.compare("turned", turned, iter(wanted))["agreement"] == 0.5
    assert "turned: 8 tokens, relative error 1." in capsys.readouterr().out


@pytest.mark.slow
def test_the_float_file_holds_the_same_model(tmp_path):
    path, floats = tmp_path / "a.gguf", tmp_path / "b.gguf"
    llamas.write_gguf(path, llamas.random_arrays())
    llama_cpp.write(floats, path)
    stored, dequantized = demo.load_llama(path), demo.load_llama(floats)
    assert isinstance(dequantized.params["embedding"], type(jnp.zeros(1)))
    window = jnp.arange(5)
    found, wanted = (
        llama_reference.logits(m.params, m.config, window) for m in (stored, dequantized)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_library_is_asked_for(monkeypatch):
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps xllamacpp"):
        llama_cpp.library()
