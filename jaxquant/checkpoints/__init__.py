"""Checkpoints of models, quantized or not, read lazily and exactly."""

from .checkpoint import Checkpoint as Checkpoint
from .gguf import open_gguf as open_gguf
from .gguf import write_gguf as write_gguf
from .huggingface import open_folder as open_folder
from .huggingface import write_folder as write_folder
from .load import put as put
from .load import swapped as swapped
from .open import open as open
from .own import open_own as open_own
from .quantize import quantize as quantize
from .quantize import write_quantized as write_quantized
from .report import CheckpointReport as CheckpointReport
from .report import CheckpointRow as CheckpointRow
from .source import Source as Source
from .source import concatenate as concatenate
from .source import stack as stack
from .stored import Stored as Stored
