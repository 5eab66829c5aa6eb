"""Floor 2: the zoo, one file a family, and how models are written down and read back."""

from .gemma2 import Gemma2, Gemma2Config
from .gpt_neox import GPTNeoX, GPTNeoXConfig
from .handle import Model
from .kimi_linear import KimiLinear, KimiLinearConfig
from .load import load
from .registry import FAMILIES, build_model, config_from_dict, config_to_dict
from .retrofit import DecodingHeadsConfig, add_decoding_heads, add_retrofits, attach
from .save import save

__all__ = [
    "FAMILIES",
    "DecodingHeadsConfig",
    "GPTNeoX",
    "GPTNeoXConfig",
    "Gemma2",
    "Gemma2Config",
    "KimiLinear",
    "KimiLinearConfig",
    "Model",
    "add_decoding_heads",
    "add_retrofits",
    "attach",
    "build_model",
    "config_from_dict",
    "config_to_dict",
    "load",
    "save",
]
