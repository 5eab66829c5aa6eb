"""Attention by tokamax: flash kernels for TPU and GPU where it has them, XLA elsewhere.

Positions, segments, windows, blocks and views are arrays here, so all go into one mask: a byte for
every query and key of a row, which the kernels read, and no block of scores is left out for it.
"""

from __future__ import annotations

from .. import optional
from .mask import visible


def attention(q, k, v, queries, keys, *, scale, softcap, window, block):
    """See :func:`..attention`."""
    mask = visible(queries, keys, window=window, block=block)
    return optional.tokamax("attention").dot_product_attention(
        q, k, v, mask=mask[:, None], scale=scale, logits_soft_cap=softcap
    )
