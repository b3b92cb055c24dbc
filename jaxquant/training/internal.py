"""What the other folders of this package use of `training` beyond what users call. Not public."""

from .fake_cast import FORWARD as FORWARD
from .fake_cast import cast_gradient as cast_gradient
from .fake_cast import cast_operand as cast_operand
from .fake_cast import next_scaling as next_scaling
