"""How models come from and go to the world's checkpoints: tables, files, plans.

Knows no family: each has its table in a file beside its model.
"""

from .configs import (
    check_fields,
    check_types,
    compute_dtype,
    object_of,
    read_object,
    rope_theta,
    types_of,
)
from .directory import read_directory
from .files import Stored, read_header
from .origin import Origin
from .read import Lazy, LoadPlan, fill, plan
from .table import Leaf, Piece, Published, Rule, layout_of_model, match
from .write import Sources, write_weights

__all__ = [
    "Lazy",
    "Leaf",
    "LoadPlan",
    "Origin",
    "Piece",
    "Published",
    "Rule",
    "Sources",
    "Stored",
    "check_fields",
    "check_types",
    "compute_dtype",
    "fill",
    "layout_of_model",
    "match",
    "object_of",
    "plan",
    "read_directory",
    "read_header",
    "read_object",
    "rope_theta",
    "types_of",
    "write_weights",
]
