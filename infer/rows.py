"""What the stages of a policy share: arrays with a row a prompt, and work done row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..errors import InputError
from ..sharding import kernel_map

# Stands where a row has fewer ids than another: no vocabulary is so large.
NO_TOKEN = np.iinfo(np.int32).max


def row_map(fn: Callable[..., Array], logits: Float[Array, "B V"], *rows: Array) -> Array:
    """``fn(logits, *rows)``, on a mesh run by each device on its own rows.

    Sorts, gathers and scatters along a vocabulary need all of it and nothing of other rows. All
    arguments and the result (``[B, V]``) have a leading batch axis.
    """
    axes = [("batch", *(None,) * (x.ndim - 1)) for x in (logits, *rows)]
    return kernel_map(fn, axes, ("batch", None))(logits, *rows)


def per_row(value: Any, batch: int, ndim: int = 0) -> Array:
    """``[B, ...]`` of what is one for all rows (``ndim`` axes) or one for each (``ndim + 1``)."""
    value = jnp.asarray(value)
    return jnp.broadcast_to(value, (batch, *value.shape[value.ndim - ndim :]))


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``: few widths, few compilations."""
    return 1 << max(count - 1, 0).bit_length()


def widened(array: np.ndarray, shape: Sequence[int], fill: Any) -> np.ndarray:
    """``array`` filled up behind to ``shape``."""
    pads = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
    return np.pad(array, pads, constant_values=fill)


def is_single(value: Any) -> bool:
    """Whether this is one thing, and no sequence of several."""
    return isinstance(value, str | bytes) or not getattr(value, "shape", hasattr(value, "__len__"))


def token_ids(name: str, ids: Any) -> np.ndarray:
    """``[S]`` int32 of an id or a sequence of them.

    Raises:
        InputError: something that is not an id, or one that no vocabulary has.
    """
    array = np.atleast_1d(np.asarray(ids))
    fits = not array.size or np.issubdtype(array.dtype, np.integer)
    if not fits or array.ndim != 1 or np.any((array < 0) | (array >= NO_TOKEN)):
        raise InputError(f"{name}={ids!r} must be a list of token ids: integers, not negative")
    return array.astype(np.int32)


def check_vocabulary(name: str, ids: Any, vocab_size: int) -> None:
    """Raise InputError if one of padded ``ids`` is beyond the vocabulary."""
    ids = np.asarray(ids)
    beyond = ids[(ids >= vocab_size) & (ids != NO_TOKEN)]
    if beyond.size:
        raise InputError(
            f"{name} has token id {beyond.flat[0]}, outside the model's vocabulary of "
            f"{vocab_size}; give ids of this model's tokenizer"
        )
