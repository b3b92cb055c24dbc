"""Methods that choose codes better than rounding to nearest, from statistics of activations."""

from ..calibration import CrossMoment as CrossMoment
from ..calibration import MaxAbs as MaxAbs
from ..calibration import MeanAbs as MeanAbs
from ..calibration import MeanSquare as MeanSquare
from ..calibration import SecondMoment as SecondMoment
from .method import Method as Method
from .method import Transform as Transform
from .method import Transformed as Transformed
