"""Jaxalope: train and run the language models that are not plain transformers."""

__version__ = "0.1.0"
