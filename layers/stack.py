"""A stack of residual blocks that repeats: scanned where it does, unrolled where it does not.

A hybrid model is a list of block kinds, such as ``K K K M | K K K M | K K M``. :func:`plan` finds
its longest repetition; the blocks before and after it are run one by one, the repeated group is run
by one ``lax.scan`` over stacked parameters, so that compile time does not grow with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import InputError

Block = Callable[..., tuple[jax.Array, Any, dict]]

# What a block's backward pass keeps of its forward pass; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all_dots": jax.checkpoint_policies.dots_saveable,
}


@dataclasses.dataclass(frozen=True)
class StackPlan:
    """Which blocks are scanned: ``repeats`` groups of ``period`` blocks from ``start`` on."""

    num_blocks: int
    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        """The first block after the scanned ones."""
        return self.start + self.period * self.repeats

    def place(self, index: int) -> tuple[str, int, int | None]:
        """Where a block lives: ``(part, i, repeat)``; ``head`` and ``tail`` have no repeat."""
        if index < self.start:
            return "head", index, None
        if index >= self.stop:
            return "tail", index - self.stop, None
        return "body", (index - self.start) % self.period, (index - self.start) // self.period


def plan(kinds: Sequence[Hashable], scan: bool = True) -> StackPlan:
    """The plan that scans most blocks of a stack of these kinds, with the shortest group.

    Without a repetition (or with ``scan=False``) every block is in the head.
    """
    count = len(kinds)
    best = StackPlan(count, count, 0, 0)
    if not scan:
        return best
    for period in range(1, count // 2 + 1):
        for start in range(count - 2 * period + 1):
            repeats = 1
            while tuple(kinds[start : start + period]) == tuple(
                kinds[start + repeats * period : start + (repeats + 1) * period]
            ):
                repeats += 1
            if repeats > 1 and repeats * period > best.repeats * best.period:
                best = StackPlan(count, start, period, repeats)
    return best


class Stack(nnx.Module):
    """Residual blocks ``block(x, cache, **context) -> (x, cache, stats)``, run in order.

    Args:
        make: ``make(kind, rngs)`` builds one block.
        kinds: the kind of every block.
        scan: run the repetition by ``lax.scan``.
        remat: a name of ``REMAT_POLICIES``.
    """

    def __init__(
        self,
        make: Callable[[Hashable, nnx.Rngs], nnx.Module],
        kinds: Sequence[Hashable],
        *,
        rngs: nnx.Rngs,
        scan: bool = True,
        remat: str = "none",
    ):
        if remat not in REMAT_POLICIES:
            raise InputError(f"remat={remat!r} is not one of {sorted(REMAT_POLICIES)}")
        self.plan = plan(kinds, scan)
        self.remat = remat

        def stacked(kind):
            @nnx.split_rngs(splits=self.plan.repeats)
            @nnx.vmap(in_axes=0, out_axes=0)
            def build(rngs):
                return make(kind, rngs)

            return build(rngs)

        group = kinds[self.plan.start : self.plan.start + self.plan.period]
        self.head = nnx.List([make(kind, rngs) for kind in kinds[: self.plan.start]])
        self.body = nnx.List([stacked(kind) for kind in group])
        self.tail = nnx.List([make(kind, rngs) for kind in kinds[self.plan.stop :]])

    def unroll(self) -> None:
        """Take the scanned blocks apart, so that every block is run by itself, in order."""

        def block(index):
            part, i, repeat = self.plan.place(index)
            one = getattr(self, part)[i]
            return one if repeat is None else nnx.merge(*_repeat(one, repeat))

        self.head = nnx.List([block(index) for index in range(self.plan.num_blocks)])
        self.body, self.tail = nnx.List([]), nnx.List([])
        self.plan = StackPlan(self.plan.num_blocks, self.plan.num_blocks, 0, 0)

    def init_cache(self, make: Callable[[nnx.Module], Any]) -> dict[str, list]:
        """A cache for every block: ``make(block)``, stacked for the scanned ones.

        Of a scanned block ``make`` sees the shapes of one layer's parameters, no numbers.
        """

        def stacked(block):
            # Slices would cost as much as a layer's weights, for nothing but their shapes.
            graphdef, state = nnx.split(block)
            layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
            one = make(nnx.merge(graphdef, layer))
            return jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (self.plan.repeats, *leaf.shape)), one
            )

        return {
            "head": [make(block) for block in self.head],
            "body": [stacked(block) for block in self.body],
            "tail": [make(block) for block in self.tail],
        }

    def __call__(
        self, x: jax.Array, cache: dict[str, list] | None = None, **context
    ) -> tuple[jax.Array, dict[str, list] | None, dict]:
        """Run every block.

        Args:
            x: activations.
            cache: as :meth:`init_cache` makes it, or None.
            **context: given to every block.

        Returns:
            The activations, the new cache (None without one), and the blocks' statistics at the
            paths of the parameters that they are about.
        """
        return self.each(lambda block, x, cache: block(x, cache, **context), x, cache)

    def each(
        self,
        call: Callable[[nnx.Module, Any, Any], tuple[Any, Any, dict]],
        x: Any,
        cache: dict[str, list] | None = None,
    ) -> tuple[Any, dict[str, list] | None, dict]:
        """``call(block, x, cache) -> (x, cache, stats)`` of every block, in order.

        What decoders do to a stack that is more than running it: ``x`` is any pytree, the same at
        every block, and ``cache`` one that :meth:`init_cache` makes. Returns as :meth:`__call__`.
        """
        policy = REMAT_POLICIES[self.remat]

        def run(graphdef, state, x, cache, scanned=False):
            def one(state, x, cache):
                return call(nnx.merge(graphdef, state), x, cache)

            if self.remat != "none":
                # Inside a scan XLA cannot undo the rematerialisation by sharing expressions.
                one = jax.checkpoint(one, policy=policy, prevent_cse=not scanned)
            return one(state, x, cache)

        def run_each(blocks, x, caches):
            new, stats = [], {}
            for i, block in enumerate(blocks):
                x, c, s = run(*nnx.split(block), x, None if caches is None else caches[i])
                new.append(c)
                if s:
                    stats[i] = s
            return x, new, stats

        caches = cache or {"head": None, "body": None, "tail": None}
        x, head, head_stats = run_each(self.head, x, caches["head"])
        body, body_stats = [], {}
        if self.plan.repeats:
            parts = [nnx.split(block) for block in self.body]

            def group(x, scanned):
                states, caches = scanned
                new, stats = [], {}
                for i, (graphdef, _) in enumerate(parts):
                    own = None if caches is None else caches[i]
                    x, c, s = run(graphdef, states[i], x, own, scanned=True)
                    new.append(c)
                    if s:
                        stats[i] = s
                return x, (new, stats)

            x, (body, body_stats) = jax.lax.scan(
                group, x, ([state for _, state in parts], caches["body"])
            )
        x, tail, tail_stats = run_each(self.tail, x, caches["tail"])
        named = {"head": head_stats, "body": body_stats, "tail": tail_stats}
        stats = {name: part for name, part in named.items() if part}
        new = None if cache is None else {"head": head, "body": body, "tail": tail}
        return x, new, stats


def _repeat(block, index):
    """One layer of a stacked block, as ``(graphdef, state)``."""
    graphdef, state = nnx.split(block)
    return graphdef, jax.tree.map(lambda leaf: leaf[index], state)


def unroll(module: nnx.Module) -> nnx.Module:
    """``module`` itself, with every stack in it taken apart; see :meth:`Stack.unroll`."""
    for _, node in nnx.iter_modules(module):
        if isinstance(node, Stack):
            node.unroll()
    return module


def unstack(tree: dict, stack_plan: StackPlan) -> list:
    """One subtree a block, in order, from a stack's parameters (or statistics, or caches)."""

    def block(index):
        part, i, repeat = stack_plan.place(index)
        subtree = tree[part][i]
        return subtree if repeat is None else jax.tree.map(lambda leaf: leaf[repeat], subtree)

    return [block(index) for index in range(stack_plan.num_blocks)]


def restack(blocks: Sequence[Any], stack_plan: StackPlan, xp: Any = jnp) -> dict:
    """The inverse of :func:`unstack`; ``xp`` is the array module that stacks."""
    tree: dict = {}
    for index in range(stack_plan.num_blocks):
        part, i, repeat = stack_plan.place(index)
        tree.setdefault(part, {}).setdefault(i, [])
        if repeat is None:
            tree[part][i] = blocks[index]
        else:
            tree[part][i].append(blocks[index])
    for i, repeats in tree.get("body", {}).items():
        tree["body"][i] = jax.tree.map(lambda *leaves: xp.stack(leaves), *repeats)
    return tree
