"""Corpora, tokenizers, packing and the input pipeline."""
