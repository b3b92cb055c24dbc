"""The demo: quantizes a pretrained sentence encoder and compares schemes."""

from .compare import SCHEMES as SCHEMES
from .compare import Result as Result
from .compare import compare as compare
from .compare import table as table
from .encoder import EncoderConfig as EncoderConfig
from .encoder import embed as embed
from .encoder import load_encoder as load_encoder
from .encoder import packaged_encoder as packaged_encoder
from .text import Tokens as Tokens
from .text import documentation_sentences as documentation_sentences
from .text import tokenize as tokenize
