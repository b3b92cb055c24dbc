"""Where scales may lie along the wrong axis, or be too many: warnings for reports."""

import math
import re

from ..core import LowRank, QTensor

# More means that few elements share a scale.
_MAX_SCALE_BITS = 2
_STACK = re.compile(r"(?i)layer|block|stack|expert|scan|repeat|(^|[/.])h([/.]|$)")
_CONVOLUTION = re.compile(r"(?i)conv")
# By the axis that a default rule contracts: the names of matrices that have it elsewhere, and the
# advice to give. PyTorch and Equinox have a weight (out, in), Flax and Keras a kernel (in, out).
_TRANSPOSED = {
    -2: (
        re.compile(r"(.*[/.])?weight"),
        "taken as (in, out); if it is (out, in), use default_rules(scheme, axis=-1) or --axis -1",
    ),
    -1: (
        re.compile(r"(.*[/.])?kernel"),
        "taken as (out, in); if it is (in, out), use default_rules(scheme, axis=-2) or --axis -2",
    ),
}


def doubt(
    path: str, q: QTensor | LowRank, is_default: bool, contracted: tuple[int, ...] | None = None
) -> str | None:
    """Why the scales of a leaf may lie along the wrong axes, or are too many; or None.

    Args:
        path: of the leaf.
        q: the quantized leaf.
        is_default: whether a default rule chose the axis, rather than the user.
        contracted: the axes that a function contracts; None if they are not known.
    """
    q = q.base if isinstance(q, LowRank) else q
    bits = 8 * q.nbytes / max(math.prod(q.shape), 1) - q.format.bits
    counts = [q.scale.shape[a] for a in q.stored_axes(range(q.ndim))]
    along = [a for a, (n, c) in enumerate(zip(q.shape, counts, strict=True)) if c < n]
    if contracted is not None and not set(along) <= set(contracted):
        axes = contracted[0] if len(contracted) == 1 else contracted
        found = ", ".join(map(str, along))
        return f"scales are shared along axis {found}, the function contracts {axes}: axis={axes}"
    if bits > _MAX_SCALE_BITS:
        lacks = contracted is None or any(q.shape[a] > 1 for a in {*contracted} - {*along})
        few = f"only {q.size // math.prod(counts)} elements share one"
        advice = "give a rule with all contracted axes" if lacks else few
        return f"scales take {bits:.1f} bits per weight; {advice}"
    if contracted is not None:
        return None
    if not is_default or along not in ([q.ndim - 2], [q.ndim - 1]):
        return None
    transposed, advice = _TRANSPOSED[along[0] - q.ndim]
    if transposed.fullmatch(path):
        return advice
    if q.ndim > 2 and not _STACK.search(path) and not _CONVOLUTION.search(path):
        return "taken as a stack of matrices; if it is not, give a rule with its contracted axes"
    return None
