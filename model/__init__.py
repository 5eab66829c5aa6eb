"""Floor 2: the zoo, one file a family, and how models are written down and read back."""

from .calm import CALM, CALMConfig
from .calm_autoencoder import CALMAutoencoder, CALMAutoencoderConfig
from .gemma2 import Gemma2, Gemma2Config
from .gpt_neox import GPTNeoX, GPTNeoXConfig
from .handle import Model
from .int8 import dequantize_weights, quantize_weights
from .kimi_linear import KimiLinear, KimiLinearConfig
from .llada import LLaDA, LLaDAConfig
from .load import load
from .lora import LoRAConfig, merge_lora
from .peft import load_lora, save_lora
from .registry import FAMILIES, build_model, config_from_dict, config_to_dict, decoding_of
from .retrofit import DecodingHeadsConfig, add_decoding_heads, add_retrofits, attach
from .save import save

__all__ = [
    "CALM",
    "FAMILIES",
    "CALMAutoencoder",
    "CALMAutoencoderConfig",
    "CALMConfig",
    "DecodingHeadsConfig",
    "GPTNeoX",
    "GPTNeoXConfig",
    "Gemma2",
    "Gemma2Config",
    "KimiLinear",
    "KimiLinearConfig",
    "LLaDA",
    "LLaDAConfig",
    "LoRAConfig",
    "Model",
    "add_decoding_heads",
    "add_retrofits",
    "attach",
    "build_model",
    "config_from_dict",
    "config_to_dict",
    "decoding_of",
    "dequantize_weights",
    "load",
    "load_lora",
    "merge_lora",
    "quantize_weights",
    "save",
    "save_lora",
]
