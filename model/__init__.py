"""Floor 2: the zoo, one file a family, and how models are written down and read back."""

from .handle import Model
from .kimi_linear import KimiLinear, KimiLinearConfig
from .load import load
from .registry import FAMILIES, build_model, config_from_dict, config_to_dict
from .retrofit import DecodingHeadsConfig, add_decoding_heads, add_retrofits, attach

__all__ = [
    "FAMILIES",
    "DecodingHeadsConfig",
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
]
