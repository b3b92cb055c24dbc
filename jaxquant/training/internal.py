"""Names of `training` that other folders of this package use but that are not public."""

from .fake_cast import FORWARD as FORWARD
from .fake_cast import cast_gradient as cast_gradient
from .fake_cast import cast_operand as cast_operand
from .fake_cast import next_scaling as next_scaling
