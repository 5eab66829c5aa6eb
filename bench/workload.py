"""What a workload says of loops that turn as often as values say, for ``plan.py``.

Kernels tell their tiles: in metadata (tokamax's and ours) or an attribute (XLA's ragged product).
What cannot be read is not guessed: None leaves a kernel without a sum.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from hlo import Instruction
from plan import Assume
from schedule import Arm, Assumed, Schedule

from jaxalope.layers.ops.latent_decode import xla as latent_xla


def cdiv(x, y):
    return -(-x // y)


def number(instruction: Instruction, name: str) -> int | None:
    """The first number after a name in what is written of a kernel."""
    found = re.search(rf"\b{name}\W+(\d+)", instruction.rest)
    return int(found[1]) if found else None


def _on(cores: int) -> str:
    return f"on {cores} core{'s' * (cores > 1)}"


def full_caches(batch: int, slots: int) -> Assume:
    """Decoding with caches that are filled to the last slot."""
    what = f"full caches: {batch} x {slots} slots"

    def assume(instruction: Instruction, found: Schedule | None) -> Assumed | None:
        if found is None:
            block = min(latent_xla._BLOCK, slots)
            return Assumed(f"{what}, {block} a turn", (cdiv(slots, block),))
        block, splits = number(instruction, "block"), number(instruction, "splits")
        if None in (block, splits) or len(found.unknown) != 1:
            return None
        # Rows, or their halves, are what cores share.
        rows = cdiv(batch * splits, found.cores)
        turns = rows * cdiv(cdiv(slots, block), splits)
        masked = cdiv(rows, splits) if slots % block else 0
        arms = _plainest(found.arms, turns - masked, masked)
        cores = min(found.cores, batch * splits)
        return Assumed(f"{what}, {block} a turn, {_on(cores)}", (turns,), arms)

    return assume


def _plainest(arms: Sequence[Arm], first: float, other: float) -> tuple[float, ...] | None:
    """Of two arms with the same products, so often the one with less beside them; else None."""
    if len(arms) != 2 or arms[0].mxu != arms[1].mxu:
        return None
    return (first, other) if arms[0].valu < arms[1].valu else (other, first)


def _by_products(arms: Sequence[Arm], often: Sequence[float]) -> tuple[float, ...] | None:
    """How often each arm runs, given it for every amount of products, the least first.

    Arms of the same amount share that alike: a kernel's cases of first and last visits differ by
    less than 1% in what was read of them.
    """
    amounts = sorted({arm.mxu for arm in arms})
    if len(amounts) != len(often):
        return None
    alike = [sum(arm.mxu == amount for arm in arms) for amount in amounts]
    share = dict(zip(amounts, (x / n for x, n in zip(often, alike, strict=True)), strict=True))
    return tuple(share[arm.mxu] for arm in arms)


def aligned_visits(sizes: np.ndarray, tile: int, empty: bool) -> int:
    """Pairs of a group and a tile of rows, of tiles that begin at multiples of their size.

    ``empty``: a group without rows is visited once.
    """
    ends = np.cumsum(sizes)
    tiles = cdiv(ends, tile) - (ends - sizes) // tile
    return int(np.where(sizes > 0, tiles, int(empty)).sum())


def own_visits(sizes: np.ndarray, tile: int, sublanes: int) -> np.ndarray:
    """Rows up to the last one of each visit, where a group's tiles begin with the group.

    As `tokamax._src.ops.gmm_v2.gmm_v2.fill_metadata` plans them: a tile begins at the whole
    sublanes before its first row.
    """
    reach = []
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        at = end - size
        while at < end:
            before = at % sublanes
            rows = min(tile - before, end - at)
            reach.append(before + rows)
            at += rows
    return np.asarray(reach)


def grouped_product(sizes: np.ndarray) -> Assume:
    """A grouped product with so many rows in each group."""
    groups = len(sizes)
    what = f"{sizes.sum()} rows in {groups} groups of {sizes.min()} to {sizes.max()}"

    def assume(instruction: Instruction, found: Schedule | None) -> Assumed | None:
        if found is None or "tpu_custom_call" not in instruction.rest:
            return None
        if instruction.name.startswith("ragged-dot-metadata"):
            return _xla_metadata(instruction, found)
        shapes = re.findall(r"\b(?:bf16|f32)\[([\d,]+)\]", instruction.rest)
        result = [int(x) for x in re.search(r"\[([\d,]+)\]", instruction.type)[1].split(",")]
        rows, depth = (int(x) for x in shapes[0].split(","))
        if rows != sizes.sum() or len(result) not in (2, 3):
            return None
        tiles = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', instruction.rest)
        own = number(instruction, "bucket_base")
        tile = [number(instruction, f"tile_{x}") for x in "mkn"]
        tile = [int(x) for x in tiles.groups()] if tiles else tile
        if None in tile:
            return None
        m, k, n = tile
        by_group = len(result) == 3  # a gradient of the weights: rows are what is summed over
        across = cdiv(result[-1], n)
        # Cores share the columns, and one has none if there is one tile of them.
        cores = min(found.cores, across)
        columns = cdiv(across, cores) * cdiv(depth, k)
        said = f"{what}, tiles of {m} x {k} x {n}, {_on(cores)}"
        if own is None:
            if len(found.unknown) != 1:
                return None
            visits = aligned_visits(sizes, m, empty=by_group)
            arms = None
            if len(found.arms) == 2:  # the last tile that is summed over, and those before
                last = visits * cdiv(across, cores)
                rest = visits * columns - last
                arms = _plainest(found.arms, rest, last)
            return Assumed(f"{said}, {visits} visits", (visits * columns,), arms)
        reach = own_visits(sizes, m, number(instruction, "size_lhs_sublane"))
        if len(found.unknown) != 3:
            return None
        # It counts in buckets: rows up to the last one, in whole ones.
        bucket = np.minimum((reach - by_group) // own, m // own - 1)
        often = np.bincount(bucket, minlength=m // own) * columns
        turns = (groups, len(reach), len(reach) * columns)
        return Assumed(
            f"{said}, {len(reach)} visits", turns, _by_products(found.arms, often.tolist())
        )

    def _xla_metadata(instruction, found):
        slots = [int(x) for x in re.findall(r"s32\[(\d+)\]", instruction.type)]
        # Whole tiles and a group's first part of one: as many slots as there may be visits.
        tile = cdiv(int(sizes.sum()), slots[1] - groups + 1)
        visits = aligned_visits(sizes, tile, empty=False)
        if len(found.unknown) != 3:
            return None
        return Assumed(what, (groups, visits, slots[1] - visits))

    return assume
