"""Floor 2: the zoo, one file a family, and how models are written down and read back."""

from .handle import Model
from .kimi_linear import KimiLinear, KimiLinearConfig
from .load import load
from .registry import FAMILIES, build_model, config_from_dict, config_to_dict

__all__ = [
    "FAMILIES",
    "KimiLinear",
    "KimiLinearConfig",
    "Model",
    "build_model",
    "config_from_dict",
    "config_to_dict",
    "load",
]
