"""Configs of quantized matrix multiplications in training: forward and both gradients."""

import dataclasses

import jax

from ..core import FP8_E4M3, FP8_E5M2, INT8, AbsMax, ArrayConfig

Pair = tuple[ArrayConfig | None, ArrayConfig | None]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductConfig:
    """How a matrix multiplication and its two gradients are quantized. Static, like `ArrayConfig`.

        out          = lhs      x rhs
        lhs gradient = gradient x rhs        gradient: that of out
        rhs gradient = gradient x lhs

    Each of the three products quantizes its own two operands, with scales shared along the axes
    that it contracts, which differ between the products.

    Attributes:
        lhs, rhs, gradient: config of each operand, None to keep it in float. With a group size,
            groups run along the last contracted axis.
        quantizes_out, quantizes_lhs_gradient, quantizes_rhs_gradient: whether that product is
            quantized; otherwise it is computed in float.
        rounds_stochastically: whether the gradient is rounded stochastically, which keeps it
            unbiased. lhs and rhs are rounded to nearest.

    Raises:
        ValueError: a field has the wrong type, or rounds_stochastically without a gradient config.

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

    def __post_init__(self) -> None:
        for name, config in self._operands():
            if not isinstance(config, ArrayConfig | None):
                raise ValueError(f"{name} must be an ArrayConfig or None; got {config!r}.")
            if config is not None and isinstance(config.group_size, tuple):
                raise ValueError(
                    f"{name}.group_size must be an int or None, because the products contract "
                    f"different numbers of axes; got {config.group_size}."
                )
        if self.rounds_stochastically and self.gradient is None:
            raise ValueError(
                "rounds_stochastically needs a config for the gradient; got "
                f"gradient={self.gradient}."
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
            ValueError: an operand has several scales, a zero point, or a range other than AbsMax().
        """
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


_INT8 = ArrayConfig(format=INT8)
_E4M3 = ArrayConfig(format=FP8_E4M3, per_tensor=True)
_E5M2 = ArrayConfig(format=FP8_E5M2, per_tensor=True)

# All three products in int8, with unbiased gradients: Chen et al. 2020 (StatQuant),
# arXiv:2010.14298, theorem 1.
INT8_TRAINING = ProductConfig(lhs=_INT8, rhs=_INT8, gradient=_INT8, rounds_stochastically=True)
# The gradient of the weights (rhs) sums over all tokens of a batch and stays in float.
# Wortsman et al. 2023 (SwitchBackQ, with scales per row), arXiv:2304.13013.
SWITCHBACK = ProductConfig(lhs=_INT8, rhs=_INT8, gradient=_INT8, quantizes_rhs_gradient=False)
# Micikevicius et al. 2022, arXiv:2209.05433, section 3.
FP8_TRAINING = ProductConfig(lhs=_E4M3, rhs=_E4M3, gradient=_E5M2)
