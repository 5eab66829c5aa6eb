"""Floor 3: decoding: policies, the loop, its steps, and ``generate``."""

from .generate import Generation, Piece, generate, stream
from .loop import DecodeState, run
from .next_token import NextToken
from .policy import Chain, Greedy, Policy, Temperature

__all__ = [
    "Chain",
    "DecodeState",
    "Generation",
    "Greedy",
    "NextToken",
    "Piece",
    "Policy",
    "Temperature",
    "generate",
    "run",
    "stream",
]
