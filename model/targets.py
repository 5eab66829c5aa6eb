"""Which weights of a module surgery is about, by name, whatever the family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flax import nnx

from ..errors import InputError
from ..layers.linear import Linear
from ..sharding import path_name


def linears(module: nnx.Module) -> dict[str, Linear]:
    """Every linear map in a module by its path, ``stack.body.0.mixer.q_proj``, in order."""
    return {
        path_name(path): node
        for path, node in sorted(nnx.iter_modules(module), key=lambda item: path_name(item[0]))
        if isinstance(node, Linear)
    }


def check_patterns(targets: Sequence[str], field: str) -> tuple[str, ...]:
    """``targets`` as a tuple of regular expressions.

    Raises:
        InputError: there is none, or one is not a regular expression.
    """
    if isinstance(targets, str) or not targets:
        raise InputError(
            f"{field}={targets!r} must be a list of regular expressions, such as "
            "('mixer.*_proj',); they are searched for in the paths of weights"
        )
    for pattern in targets:
        try:
            re.compile(pattern)
        except re.error as e:
            raise InputError(f"{field}: {pattern!r} is no regular expression ({e})") from e
    return tuple(targets)


def matching(names: Iterable[str], targets: Sequence[str], field: str) -> list[str]:
    """The names in which one of the ``targets`` is found.

    Raises:
        InputError: a target that is found in none.
    """
    names = list(names)
    for pattern in targets:
        if not any(re.search(pattern, name) for name in names):
            raise InputError(
                f"{field}: {pattern!r} is found in no weight's path, of which there are, for "
                f"example, {', '.join(names[:3]) or 'none'}"
            )
    return [name for name in names if any(re.search(pattern, name) for pattern in targets)]
