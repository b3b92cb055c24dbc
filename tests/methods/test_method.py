from typing import Any

import pytest

from jaxquant.methods import AWQ, HQQ, SINQ, AutoRound, Importance, SmoothQuant

COUNTS: dict[Any, str] = {
    AWQ: "grid",
    SmoothQuant: "grid",
    AutoRound: "iterations",
    HQQ: "iterations",
    SINQ: "iterations",
    Importance: "steps",
}


@pytest.mark.parametrize("method", COUNTS)
@pytest.mark.parametrize("value", [-1, 2.5, True, "4"])
def test_counts_must_be_integers(method, value):
    name = COUNTS[method]
    with pytest.raises(ValueError, match=rf"^{name} must be a .*ive int; got {value!r}\.$"):
        method(**{name: value})
