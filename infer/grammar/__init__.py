"""Structured output, host side: grammars as token masks that the jitted sampler applies.

grammar = JsonSchema({"type": "array", "items": {"type": "integer"}}).compile(tokenizer)
matcher = grammar.matcher()  # One a request.
matcher.mask(words[row])  # int32 [ceil(V / 32)], while the device runs the forward pass.
matcher.accept(token)  # That the sampler drew.
"""

from .matcher import Grammar, GrammarMatcher
from .specs import Json, JsonSchema, LarkGrammar, Regex
from .vocabulary import Vocabulary

__all__ = [
    "Grammar",
    "GrammarMatcher",
    "Json",
    "JsonSchema",
    "LarkGrammar",
    "Regex",
    "Vocabulary",
]
