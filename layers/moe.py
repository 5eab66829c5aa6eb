"""A dropless mixture of experts with a sigmoid router, balanced by a bias instead of a loss.

The router of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) as Moonlight and Kimi Linear use it: the
bias takes part in choosing experts and in nothing else, and is learnt from the experts' loads. The
arithmetic of the experts is :mod:`jaxalope.layers.ops.grouped_matmul`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError
from ..sharding import constrain, kernel_map, project, psum_over
from .int8 import stored, stored_axes
from .linear import normal
from .mlp import SwiGLU
from .ops.grouped_matmul import grouped_swiglu

# Up to this many (token, expert) pairs, if they are no more than half of the experts, each pair's
# weights are sliced out and applied one by one: a few matrix-vector products, where sorting and
# grouping would read every expert. Unrolled.
FEW_PAIRS = 16


class Router(nnx.Module):
    """Scores every expert for every token in float32 and picks ``top_k``; see :class:`MoE`."""

    def __init__(
        self,
        features: int,
        num_experts: int,
        top_k: int,
        *,
        num_expert_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        rngs: nnx.Rngs,
        stddev: float = 0.02,
    ):
        _check_router(num_experts, top_k, num_expert_groups, topk_groups)
        self.kernel = nnx.Param(
            normal(rngs.params(), (features, num_experts), stddev), axes=("embed", None)
        )
        self.bias = nnx.Param(
            jnp.zeros((num_experts,), jnp.float32), axes=("experts",), gradient_free=True
        )
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_expert_groups = num_expert_groups
        self.topk_groups = topk_groups
        self.renormalize = renormalize
        self.scaling_factor = scaling_factor

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
        """The chosen experts of every token, best first, and their float32 weights."""
        scores = jax.nn.sigmoid(
            project(
                x.astype(jnp.float32),
                self.kernel[...],
                # Whole in the expert dimension: a choice among experts needs all of them.
                ("batch", "seq", None),
                precision=jax.lax.Precision.HIGHEST,
            )
        )
        bias = jax.lax.stop_gradient(constrain(self.bias[...], None))
        ids = self._choose(jax.lax.stop_gradient(scores) + bias)
        # A masked sum rather than a gather: its transpose is not a scatter.
        chosen = ids[..., None] == jnp.arange(self.num_experts)
        weights = jnp.sum(jnp.where(chosen, scores[..., None, :], 0.0), axis=-1)
        if self.renormalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return ids, weights * self.scaling_factor

    def _choose(self, scores: Float[Array, "B T E"]) -> Int[Array, "B T k"]:
        if self.num_expert_groups > 1:
            grouped = scores.reshape(*scores.shape[:-1], self.num_expert_groups, -1)
            group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
            groups = jax.lax.top_k(group_scores, self.topk_groups)[1]
            kept = jnp.any(groups[..., None] == jnp.arange(self.num_expert_groups), axis=-2)
            scores = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
        return jax.lax.top_k(scores, self.top_k)[1]


class Experts(nnx.Module):
    """The weights of ``num_experts`` SwiGLU layers, stacked."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        stddev: float = 0.02,
    ):
        wide = (num_experts, features, hidden_features)
        axes = ("experts", "embed", "mlp")
        self.gate = nnx.Param(normal(rngs.params(), wide, stddev), axes=axes)
        self.up = nnx.Param(normal(rngs.params(), wide, stddev), axes=axes)
        self.down = nnx.Param(
            normal(rngs.params(), (num_experts, hidden_features, features), stddev),
            axes=("experts", "mlp", "embed"),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ids: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        *,
        implementation: str | None = None,
    ) -> Float[Array, "B T D"]:
        """``sum over k of weights * expert[ids](x)``; an id past the last expert adds nothing."""
        tokens = ("batch", "seq", None)
        names = ("gate", "up", "down")
        return kernel_map(
            partial(_mix, implementation=implementation),
            (tokens, tokens, tokens, ("experts",), *(stored_axes(self, name) for name in names)),
            tokens,
        )(
            x,
            ids,
            weights,
            jnp.arange(self.gate.shape[0]),
            *(stored(self, name) for name in names),
        )


class MoE(nnx.Module):
    """``sum of weight_e * expert_e(x) over the chosen experts, plus shared(x)``. Dropless.

    Scores are ``s = sigmoid(x @ router.kernel)``. The ``top_k`` experts of largest
    ``s + router.bias`` are chosen, among the ``topk_groups`` best of ``num_expert_groups`` groups
    (by the sum of a group's two largest). Their weights are ``s``, without the bias, divided by
    their sum if ``renormalize``, times ``routed_scaling_factor``. Shared experts see every token
    and are neither gated nor scaled.

    Args:
        features: D, the model's width.
        hidden_features: F, the width of one expert.
        num_experts: routed experts.
        top_k: experts of a token.
        num_shared_experts: the shared SwiGLU has this many times ``hidden_features``; 0 for none.
        num_expert_groups: equal groups that the routed experts form.
        topk_groups: groups that a token may choose from.
        renormalize: make the weights of a token sum to ``routed_scaling_factor``.
        routed_scaling_factor: see :func:`routed_scaling_factor`.
        rngs: source of the initial weights.
        stddev: of the initial weights.
        implementation: of the experts' products; see
            :func:`jaxalope.layers.ops.grouped_matmul.grouped_matmul`.

    Raises:
        InputError: numbers of experts, groups and choices that do not fit together.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        num_experts: int,
        top_k: int,
        num_shared_experts: int = 1,
        num_expert_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = True,
        routed_scaling_factor: float = 1.0,
        rngs: nnx.Rngs,
        stddev: float = 0.02,
        implementation: str | None = None,
    ):
        self.router = Router(
            features,
            num_experts,
            top_k,
            num_expert_groups=num_expert_groups,
            topk_groups=topk_groups,
            renormalize=renormalize,
            scaling_factor=routed_scaling_factor,
            rngs=rngs,
            stddev=stddev,
        )
        self.experts = Experts(features, hidden_features, num_experts, rngs=rngs, stddev=stddev)
        self.shared = (
            SwiGLU(features, hidden_features * num_shared_experts, rngs=rngs, stddev=stddev)
            if num_shared_experts
            else None
        )
        self.implementation = implementation

    def __call__(
        self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "E"]]:
        """Apply to every token.

        Args:
            x: activations.
            valid: False at padding, which then is not routed: its output is the shared experts'
                alone. None when every position is a token.

        Returns:
            The output in the dtype of ``x``, and the load: how many times each expert was chosen in
            the whole batch, float32, without a gradient.
        """
        ids, weights = self.router(x)
        num_experts = self.router.num_experts
        if valid is not None:
            ids = jnp.where(valid[..., None], ids, num_experts)
        chosen = ids[..., None] == jnp.arange(num_experts)
        load = jnp.sum(chosen.astype(jnp.float32), axis=(0, 1, 2))
        y = self.experts(x, ids, weights, implementation=self.implementation)
        return (y if self.shared is None else y + self.shared(x)), load


def routed_scaling_factor(
    num_experts: int, top_k: int, *, seed: int = 0, num_samples: int = 20_000
) -> float:
    """The factor that gives the routed experts' sum the scale of one dense layer.

    Experts of independent, equally large outputs, weighted by ``p``, add up to an RMS of
    ``sqrt(sum p²)`` of one. Its inverse is averaged over normally distributed logits: ``p`` is the
    ``top_k`` largest of ``num_experts`` sigmoids divided by their sum. The recipe of Moonlight
    (arXiv 2502.16982): 2.446 for its 6 of 64 experts, a value that Kimi Linear keeps with 8 of 256,
    for which the recipe itself gives 2.827.

    Args:
        num_experts: routed experts.
        top_k: experts of a token.
        seed: of the Monte-Carlo sample.
        num_samples: its size; the standard error is below 0.1 % from 20,000 on.
    """
    logits = np.random.default_rng(seed).standard_normal((num_samples, num_experts))
    scores = 1 / (1 + np.exp(-np.sort(logits, axis=1)[:, num_experts - top_k :]))
    p = scores / scores.sum(axis=1, keepdims=True)
    return float(np.mean(1 / np.sqrt(np.sum(p**2, axis=1))))


def _check_router(num_experts: int, top_k: int, num_groups: int, topk_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise InputError(
            f"num_expert_groups={num_groups} must divide num_experts={num_experts}; change one"
        )
    if not 1 <= topk_groups <= num_groups:
        raise InputError(
            f"topk_groups={topk_groups} must lie between 1 and num_expert_groups={num_groups}"
        )
    group = num_experts // num_groups
    if num_groups > 1 and group < 2:
        raise InputError(
            f"num_expert_groups={num_groups} leaves {group} of num_experts={num_experts} in a "
            "group, and a group is scored by its two best; use fewer groups"
        )
    if not 1 <= top_k <= topk_groups * group:
        raise InputError(
            f"top_k={top_k} must lie between 1 and the {topk_groups * group} experts that "
            f"topk_groups={topk_groups} of num_expert_groups={num_groups} leave; change one"
        )


def _mix(x, ids, weights, experts, gate, up, down, *, implementation):
    """The experts on one device: its tokens, its experts (``experts`` are their ids), its columns.

    Pairs whose expert lies elsewhere add nothing here; the sum over devices adds them.
    """
    shape, pairs = x.shape, ids.size
    x = x.reshape(-1, shape[-1])
    local = ids.reshape(x.shape[0], -1) - experts[0]
    here = (local >= 0) & (local < experts.size)
    weights = jnp.where(here, weights.reshape(local.shape), 0.0)
    if pairs <= min(FEW_PAIRS, experts.size // 2) and implementation is None:
        y = _one_by_one(x, jnp.where(here, local, 0), weights, gate, up, down)
    else:
        local = jnp.where(here, local, experts.size)
        # Int8 is made numbers; the product casts others itself, and rounds no gradient of theirs.
        numbers = (w if isinstance(w, jax.Array) else w.astype(x.dtype) for w in (gate, up, down))
        y = _grouped(x, local, weights, *numbers, implementation=implementation)
    y = psum_over(psum_over(y, "experts"), "mlp")
    return y.astype(x.dtype).reshape(shape)


def _one_by_one(x, local, weights, gate, up, down):
    """Every (token, expert) pair by itself: ``[N, D]`` float32."""

    def expert(e, *stacked):
        # One slice a weight: chained after a layer scan's own slice, XLA copies this expert only.
        def slice_of(array):
            return jax.lax.dynamic_index_in_dim(array, e, 0, False)

        return (jax.tree.map(slice_of, w).astype(x.dtype) for w in stacked)

    rows = []
    for token in range(x.shape[0]):
        row = 0.0
        for choice in range(local.shape[1]):
            g, u, d = expert(local[token, choice], gate, up, down)
            hidden = (jax.nn.silu(x[token] @ g) * (x[token] @ u)) @ d
            row = row + weights[token, choice] * hidden.astype(jnp.float32)
        rows.append(row)
    return jnp.stack(rows)


def _grouped(x, local, weights, gate, up, down, *, implementation):
    """Pairs sorted by expert, those of no expert here last: ``[N, D]`` float32."""
    num_tokens, top_k = local.shape
    key = local.reshape(-1)
    order = jnp.argsort(key, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(key[:, None] == jnp.arange(gate.shape[0]), axis=0, dtype=jnp.int32)
    rows = _spread(top_k, x, order, inverse)
    rows = grouped_swiglu(rows, gate, up, down, sizes, implementation=implementation)
    rows = _permute(rows, inverse, order).reshape(num_tokens, top_k, -1)
    return jnp.sum(rows.astype(jnp.float32) * weights[..., None], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(top_k, x, order, inverse):
    """``repeat(x, top_k)[order]``: a token's row for each of its pairs, in the pairs' order."""
    return x.at[order // top_k].get(mode="promise_in_bounds")


def _spread_fwd(top_k, x, order, inverse):
    return _spread(top_k, x, order, inverse), inverse


def _spread_bwd(top_k, inverse, dy):
    pairs = dy.at[inverse].get(mode="promise_in_bounds").reshape(-1, top_k, dy.shape[1])
    dx = jnp.sum(pairs.astype(jnp.float32), axis=1).astype(dy.dtype)
    no_gradient = np.zeros(inverse.shape, jax.dtypes.float0)
    return dx, no_gradient, no_gradient


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def _permute(x, order, inverse):
    """``x[order]``, whose gradient is the gather ``[inverse]`` rather than a scatter."""
    return x.at[order].get(mode="promise_in_bounds")


def _permute_fwd(x, order, inverse):
    return _permute(x, order, inverse), (order, inverse)


def _permute_bwd(residuals, dy):
    order, inverse = residuals
    no_gradient = np.zeros(order.shape, jax.dtypes.float0)
    return dy.at[inverse].get(mode="promise_in_bounds"), no_gradient, no_gradient


_permute.defvjp(_permute_fwd, _permute_bwd)
