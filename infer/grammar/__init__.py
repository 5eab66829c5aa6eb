"""Structured output, host side: grammars as token masks that the jitted sampler applies."""

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
