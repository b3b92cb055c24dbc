"""Names of `lift` that other folders of this package use but that are not public."""

from .find_uses import find_uses as find_uses
from .interpreter import Equation as Equation
from .interpreter import Options as Options
from .interpreter import as_array as as_array
from .interpreter import evaluate as evaluate
from .parameter import Parameter as Parameter
from .parameter import Tagged as Tagged
from .parameter import Unsupported as Unsupported
from .products import ragged_order as ragged_order
from .products import swapped_dot_general as swapped_dot_general
from .programs import scan_rule as scan_rule
from .tagged import is_tagged as is_tagged
from .tagged import tagged_rules as tagged_rules
from .trace import is_input as is_input
from .trace import is_quantized as is_quantized
from .trace import trace_function as trace_function
from .views import view_of as view_of
