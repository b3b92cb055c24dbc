"""Configs of quantized matrix multiplications in training: forward and both gradients."""

import dataclasses

import jax

from ..core import AbsMax, ArrayConfig, hadamard

Pair = tuple[ArrayConfig | None, ArrayConfig | None]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductConfig:
    """How a matrix multiplication and its two gradients are quantized. Static, like `ArrayConfig`.

        out          = lhs      x rhs
        lhs gradient = gradient x rhs        gradient: that of out
        rhs gradient = gradient x lhs

    Each of the three products quantizes its own two operands, with scales shared along the axes
    that it contracts, which differ between the products. Groups run along the last contracted axis
    of its first operand that is at least as long, or else along the longest. The last group of an
    axis may be shorter.

    Attributes:
        lhs, rhs, gradient: config of each operand, None to keep it in float. With a group size
            (c, f), lhs and rhs have the same 2-D blocks in all products: c elements of an axis
            that out contracts by f of the last axis that it keeps.
        quantizes_out, quantizes_lhs_gradient, quantizes_rhs_gradient: whether that product is
            quantized; otherwise it is computed in float.
        rounds_stochastically: whether the gradient is rounded stochastically, which keeps it
            unbiased. lhs and rhs are rounded to nearest. Scales of the gradient are then rounded
            up to their dtype, so that no element is clipped.
        rounds_scales_up: whether all scales are.
        rhs_gradient_rotation: in the gradient of rhs, both operands are multiplied by the same
            random Hadamard matrix of this order, in blocks along the contracted axis, which
            spreads outliers over the block; None for no rotation. Ragged products and grouped
            convolutions do not rotate.

    Raises:
        ValueError: a field has the wrong type, rounds_stochastically without a gradient config, or
            no Hadamard matrix has the order.

    Example:
        >>> int8 = jq.ArrayConfig()
        >>> config = jq.training.ProductConfig(lhs=int8, rhs=int8)
        >>> jq.training.matmul(jnp.ones((2, 3)), jnp.ones((3, 1)), config=config).tolist()
        [[3.0], [3.0]]
    """

    lhs: ArrayConfig | None = None
    rhs: ArrayConfig | None = None
    gradient: ArrayConfig | None = None
    quantizes_out: bool = True
    quantizes_lhs_gradient: bool = True
    quantizes_rhs_gradient: bool = True
    rounds_stochastically: bool = False
    rounds_scales_up: bool = False
    rhs_gradient_rotation: int | None = None

    def __post_init__(self) -> None:
        for name, config in self._operands():
            if not isinstance(config, ArrayConfig | None):
                raise ValueError(f"{name} must be an ArrayConfig or None; got {config!r}.")
            self._check_blocks(name, config)
        if self.rounds_stochastically and self.gradient is None:
            raise ValueError(
                "rounds_stochastically needs a config for the gradient; got "
                f"gradient={self.gradient}."
            )
        if self.rhs_gradient_rotation is not None:
            hadamard(self.rhs_gradient_rotation)

    def _check_blocks(self, name, config):
        size = None if config is None else config.group_size
        if not isinstance(size, tuple):
            return
        is_side = any(name == side for side, _ in self._operands()[:2])
        if not is_side or len(size) != 2 or None in size:
            raise ValueError(
                f"{name}.group_size must be an int or None, or two ints for 2-D blocks of lhs or "
                f"rhs; got {size}. The two gradients contract different axes of gradient."
            )

    @property
    def of_out(self) -> Pair:
        """Configs of lhs and rhs in the product itself."""
        return (self.lhs, self.rhs) if self.quantizes_out else (None, None)

    @property
    def of_lhs_gradient(self) -> Pair:
        """Configs of the gradient and of rhs in the gradient of lhs."""
        return (self.gradient, self.rhs) if self.quantizes_lhs_gradient else (None, None)

    @property
    def of_rhs_gradient(self) -> Pair:
        """Configs of the gradient and of lhs in the gradient of rhs."""
        return (self.gradient, self.lhs) if self.quantizes_rhs_gradient else (None, None)

    def check_delayed(self) -> None:
        """Checks that the config supports delayed scaling.

        Raises:
            ValueError: an operand has several scales, a zero point, or a range other than AbsMax();
                or operands are rotated, whose range is another one.
        """
        if self.rhs_gradient_rotation is not None:
            raise ValueError(
                "scaling has the ranges of operands that are not rotated; got "
                f"rhs_gradient_rotation={self.rhs_gradient_rotation}. Leave one of them None."
            )
        for name, config in self._operands():
            if config is None:
                continue
            if not (config.per_tensor and config.symmetric and config.range == AbsMax()):
                raise ValueError(
                    "scaling has one range for each operand, so its config must have "
                    f"per_tensor=True, symmetric=True and range=AbsMax(); got {name}={config!r}. "
                    "Leave scaling None, or use a config such as training.FP8_TRAINING."
                )

    def _operands(self):
        return ("lhs", self.lhs), ("rhs", self.rhs), ("gradient", self.gradient)
