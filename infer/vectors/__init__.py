"""Next-vector decoding: a chunk of tokens a step, drawn without a likelihood."""

from .api import REMAINDERS
from .draws import BatchRows, Drawn, ExactRows, draw_chunks
from .step import NextVector, next_vector_step
from .temperature import BatchTemperature, ExactTemperature

__all__ = [
    "REMAINDERS",
    "BatchRows",
    "BatchTemperature",
    "Drawn",
    "ExactRows",
    "ExactTemperature",
    "NextVector",
    "draw_chunks",
    "next_vector_step",
]
