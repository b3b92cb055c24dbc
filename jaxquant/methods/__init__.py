"""Methods that choose codes better than rounding to nearest, from statistics of activations."""

from ..core import hadamard as hadamard
from .auto_round import AutoRound as AutoRound
from .awq import AWQ as AWQ
from .error_feedback import predicted_gain as predicted_gain
from .gptq import GPTQ as GPTQ
from .hqq import HQQ as HQQ
from .importance import Importance as Importance
from .method import Method as Method
from .method import Transform as Transform
from .method import Transformed as Transformed
from .nearest import Nearest as Nearest
from .rotation import Rotation as Rotation
from .sinq import SINQ as SINQ
from .smooth_quant import SmoothQuant as SmoothQuant
from .statistics import CrossMoment as CrossMoment
from .statistics import MaxAbs as MaxAbs
from .statistics import MeanAbs as MeanAbs
from .statistics import MeanSquare as MeanSquare
from .statistics import SecondMoment as SecondMoment
from .statistics import Statistic as Statistic
