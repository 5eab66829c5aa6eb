"""How a published tensor and one of our parameters hold the same numbers: ``"(n k) d -> d n k"``.

Left of the arrow stand the dimensions of the published tensor, right of it ours. Each dimension is
named once; a group in parentheses is one published dimension that is several of ours, its first
name outermost. Beside names, the left side may have

- ``1``: an axis of size one that only the published tensor has;
- ``j/m``: an axis of size ``m`` of which our parameter is entry ``j`` (several of our parameters
  are merged in one published tensor, as GPT-NeoX' query, key and value are);
- ``h*``: a dimension whose published size may be larger than ours; what lies behind is zeros.

Names that only the right side has stand first there and count tensors: in ``"f d -> e d f"`` expert
``e`` is a published tensor of its own. Sizes are read off our parameter's shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

_TOKEN = re.compile(r"\s*(\(|\)|\d+/\d+|1(?![\d/])|[a-z_]+\*?)")


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One axis of the published tensor, once its groups are apart."""

    name: str | None = None
    pick: tuple[int, int] | None = None
    padded: bool = False

    def size(self, sizes: dict[str, int]) -> int:
        return self.pick[1] if self.pick else sizes[self.name]

    def range(self, ranges: dict[str, slice]) -> slice:
        return slice(self.pick[0], self.pick[0] + 1) if self.pick else ranges[self.name]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parsed layout; see the module.

    Attributes:
        published: of each published dimension, its axes; none for one of size one.
        ours: names of our dimensions.
        stacked: how many of the first of ``ours`` count published tensors.
    """

    published: tuple[tuple[_Axis, ...], ...]
    ours: tuple[str, ...]
    stacked: int

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> Layout:
        """The layout that ``text`` writes down.

        Raises:
            ValueError: it does not follow the module's rules.
        """
        left, arrow, right = text.partition("->")
        ours = tuple(right.split())
        published: list[tuple[_Axis, ...]] = []
        group: list[_Axis] | None = None
        position = 0
        while left[position:].strip():
            found = _TOKEN.match(left, position)
            if not found:
                raise ValueError(f"layout {text!r}: cannot read {left[position:]!r}")
            position, token = found.end(), found[1]
            if token == "(":
                group = []
                continue
            if token == ")":
                published.append(tuple(group or ()))
                group = None
                continue
            axes = () if token == "1" else (_axis(token),)
            if group is None:
                published.append(axes)
            else:
                group.extend(axes)
        named = [axis.name for axes in published for axis in axes if axis.name]
        stacked = next((i for i, name in enumerate(ours) if name in named), len(ours))
        if not arrow or sorted(named) != sorted(ours[stacked:]):
            raise ValueError(f"layout {text!r}: each dimension must stand once on both sides")
        return cls(tuple(published), ours, stacked)

    def published_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The published shape for our ``shape`` (the smallest, where it may be padded)."""
        sizes = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(axis.size(sizes) for axis in axes) for axes in self.published)

    def fits(self, published: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether a published tensor of that shape holds our parameter of this one."""
        wanted = self.published_shape(shape)
        padded = [any(axis.padded for axis in axes) for axes in self.published]
        return len(wanted) == len(published) and all(
            size >= least if more else size == least
            for size, least, more in zip(published, wanted, padded, strict=True)
        )

    @property
    def order(self) -> tuple[int, ...]:
        """Where each of our dimensions (without the stacked ones) stands in the published order."""
        named = [axis.name for axes in self.published for axis in axes if not axis.pick]
        return tuple(named.index(name) for name in self.ours[self.stacked :])

    @property
    def published_order(self) -> tuple[int, ...]:
        """The inverse of :attr:`order`."""
        order = self.order
        return tuple(order.index(i) for i in range(len(order)))

    def read(
        self,
        fetch: Callable[[tuple[slice, ...]], np.ndarray],
        shape: Sequence[int],
        index: Sequence[slice],
    ) -> np.ndarray:
        """Part ``index`` of our parameter from one published tensor.

        Args:
            fetch: the published tensor's values at a slice of every dimension.
            shape: ours, the stacked dimensions included.
            index: a slice with start and stop of each of our dimensions but the stacked ones.

        Returns:
            A view of what ``fetch`` returned, our dimensions in the published order; transpose it
            by :attr:`order`.
        """
        sizes = dict(zip(self.ours, shape, strict=True))
        ranges = dict(zip(self.ours[self.stacked :], index, strict=True))
        outer, apart, inner = [], [], []
        for axes in self.published:
            if not axes:
                outer.append(slice(0, 1))
                continue
            first, rest = axes[0], axes[1:]
            # Only the outermost axis of a group is read in part; the others are cut afterwards.
            stride = math.prod(axis.size(sizes) for axis in rest)
            taken = first.range(ranges)
            outer.append(slice(taken.start * stride, taken.stop * stride))
            apart += [taken.stop - taken.start, *(axis.size(sizes) for axis in rest)]
            inner += [slice(None), *(axis.range(ranges) for axis in rest)]
        return self._without_picks(fetch(tuple(outer)).reshape(apart)[tuple(inner)])

    def write(self, target: np.ndarray, value: np.ndarray, shape: Sequence[int]) -> None:
        """Put one of our tensors where it lies in the published ``target``.

        Args:
            target: the published tensor; written to.
            value: ours, without the stacked dimensions, the others in the published order.
            shape: ours, the stacked dimensions included.
        """
        sizes = dict(zip(self.ours, shape, strict=True))
        view = target[tuple(slice(0, size) for size in self.published_shape(shape))]
        axes = [axis for group in self.published for axis in group]
        view = view.reshape([axis.size(sizes) for axis in axes], copy=False)
        picked = tuple(
            slice(axis.pick[0], axis.pick[0] + 1) if axis.pick else slice(None) for axis in axes
        )
        self._without_picks(view[picked])[...] = value

    def _without_picks(self, value: np.ndarray) -> np.ndarray:
        """``value`` without its picked axes, of size one now."""
        axes = [axis for group in self.published for axis in group]
        return np.squeeze(value, tuple(i for i, axis in enumerate(axes) if axis.pick))


def _axis(token: str) -> _Axis:
    if "/" in token:
        j, m = map(int, token.split("/"))
        if j >= m:
            raise ValueError(f"{token}: there are entries 0 to {m - 1}")
        return _Axis(pick=(j, m))
    return _Axis(token.rstrip("*"), padded=token.endswith("*"))
