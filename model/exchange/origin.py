"""What a model remembers of the published checkpoint that it was read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .files import DTYPES, dtype_name
from .table import Form


@dataclasses.dataclass(frozen=True)
class Origin:
    """So that a model is written as it was read: unknown fields, names, dtypes and shapes.

    Attributes:
        config: contents of its ``config.json``.
        tensors: the form in which each tensor was read.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Form]

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        tensors = {
            name: [dtype_name(dtype), list(shape)] for name, (dtype, shape) in self.tensors.items()
        }
        return {"config": dict(self.config), "tensors": tensors}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Origin:
        """The inverse of :meth:`to_json`."""
        tensors = {
            name: (DTYPES[dtype], tuple(shape))
            for name, (dtype, shape) in values["tensors"].items()
        }
        return cls(values["config"], tensors)
