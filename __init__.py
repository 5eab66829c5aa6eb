"""Jaxalope: train and run the language models that are not plain transformers.

The public face. Names are imported when first used, so that ``import jaxalope`` is instant.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Chain": "infer",
    "Generation": "infer",
    "Greedy": "infer",
    "InputError": "errors",
    "Model": "model",
    "Piece": "infer",
    "Policy": "infer",
    "Temperature": "infer",
    "generate": "infer",
    "load": "model",
    "stream": "infer",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_PUBLIC])
