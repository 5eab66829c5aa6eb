"""Jaxalope: train and run the language models that are not plain transformers.

The public face. Names are imported when first used, so that ``import jaxalope`` is instant.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "BadWords": "infer",
    "BatchTemperature": "infer",
    "BeamResult": "infer",
    "BrierLM": "evals",
    "Chain": "infer",
    "Denoised": "infer",
    "DraftModel": "infer",
    "Dynamic": "infer",
    "ElasticCache": "infer",
    "EntropyBounded": "infer",
    "ExactTemperature": "infer",
    "Factor": "infer",
    "Generation": "infer",
    "GrammarMask": "infer",
    "Greedy": "infer",
    "Independent": "infer",
    "InputError": "errors",
    "LoRAConfig": "model",
    "LogitBias": "infer",
    "MinNewTokens": "infer",
    "MinP": "infer",
    "Model": "model",
    "NoRepeatNgram": "infer",
    "Piece": "infer",
    "Policy": "infer",
    "PowerSamples": "infer",
    "Predicted": "infer",
    "PresenceFrequencyPenalty": "infer",
    "PromptLookup": "infer",
    "ReadError": "errors",
    "RepetitionPenalty": "infer",
    "SaveError": "errors",
    "SoftTopP": "infer",
    "Temperature": "infer",
    "Threshold": "infer",
    "TopCount": "infer",
    "TopK": "infer",
    "TopP": "infer",
    "TopQuota": "infer",
    "Typical": "infer",
    "Vote": "infer",
    "beam_search": "infer",
    "best_of_n": "infer",
    "brier_lm": "evals",
    "chat": "infer",
    "denoise": "infer",
    "dequantize_weights": "model",
    "diffusion_log_likelihood": "infer",
    "dream": "infer",
    "generate": "infer",
    "load": "model",
    "load_lora": "model",
    "merge_lora": "model",
    "parse_policy": "infer",
    "parse_rule": "infer",
    "power_sample": "infer",
    "quantize_weights": "model",
    "save": "model",
    "save_lora": "model",
    "self_consistency": "infer",
    "stream": "infer",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_PUBLIC])
