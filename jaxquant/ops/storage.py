"""The fastest storage order of the axes of a quantized array, per platform."""

from ..core import Axes, QTensor, normalize_axes

# Whether the contracted axis should lie last. CPU: contracting the last axis of both operands is 4
# to 7 times faster (4096 x 4096, up to 16 rows). TPU: the kernels read it second to last; XLA takes
# as long either way if scales are per channel, and ten times as long with grouped scales last,
# because they broadcast along sublanes only (v5e, the compiler's estimate).
_CONTRACTS_LAST = {"cpu": True, "gpu": True, "tpu": False}


def best_order(q: QTensor, platform: str, contracted: Axes = None) -> tuple[int, ...] | None:
    """The `order` in which products on the platform read a quantized array fastest.

    Args:
        q: quantized array.
        platform: "cpu", "gpu" or "tpu", as `jax.default_backend()` says.
        contracted: the axes that products sum over; None for what scales say of an array that is
            quantized along one axis. Others, such as convolution kernels, keep their order then.

    Raises:
        ValueError: the platform is unknown, or an axis is out of range.

    Example:
        >>> w = jq.quantize(jnp.ones((8, 4)), jq.ArrayConfig(), axis=0)
        >>> jq.best_order(w, "cpu")
        (-1, -2)
    """
    if platform not in _CONTRACTS_LAST:
        raise ValueError(f"platform must be {', '.join(_CONTRACTS_LAST)}; got {platform!r}.")
    scale = [q.scale.shape[a] for a in q.stored_axes(range(q.ndim))]
    if contracted is None:
        axes = [a for a in range(q.ndim) if scale[a] < q.shape[a]]
        if len(axes) != 1:
            return q.order
    else:
        axes = sorted(normalize_axes(contracted, q.ndim))
    last = _CONTRACTS_LAST[platform]
    is_last = [*q.stored_axes(axes)] == [*range(q.ndim - len(axes), q.ndim)]
    if last and is_last:
        return q.order
    # Second to last on TPUs, where matrices (K, N) have it.
    first = axes[0] if last or len(axes) < q.ndim - axes[0] else max(axes[0] - 1, 0)
    free = [a for a in range(first, q.ndim) if a not in axes]
    order = tuple(a - q.ndim for a in (free + axes if last else axes + free))
    return None if order == (*range(-len(order), 0),) else order
