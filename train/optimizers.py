"""Optimizers: which parameter is trained, and how.

Everything here works on *flat* parameters, ``{"stack.body.0.mixer.q_proj.kernel": array}``: a part
of a model (its matrices, what is not frozen) is then a smaller dict, and an optimizer's state holds
moments for exactly what it trains, under the names that users see.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ..configs.optimizers import AdamW, Muon
from ..errors import InputError
from ..sharding import Params, param_axes, path_name
from .muon import Matrix, as_matrix, scale_by_muon

FlatParams = dict[str, Array]

_NO_DECAY = ("A_log", "dt_bias")
# A convolution's kernel is a row of taps for each channel, whatever its axes; a bias is a vector.
_NOT_A_MATRIX = re.compile(r"conv|bias$|scale$")


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What a module says of a parameter: its path, logical axes, and whether gradients train it."""

    path: tuple[Any, ...]
    axes: tuple[str | None, ...]
    gradient_free: bool


def param_info(module: nnx.Module) -> dict[str, ParamInfo]:
    """:class:`ParamInfo` of every parameter, by the name that users see."""
    axes = flatten(param_axes(module), is_leaf=lambda x: isinstance(x, tuple))
    return {
        path_name(path): ParamInfo(
            path, axes[path_name(path)], param.get_metadata().get("gradient_free", False)
        )
        for path, param in nnx.to_flat_state(nnx.state(module))
    }


def flatten(params: Params, is_leaf=None) -> dict[str, Any]:
    """A nested dict as ``{"a.b.0.c": leaf}``."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any], info: Mapping[str, ParamInfo]) -> Params:
    """The nested dict of :func:`flatten`."""
    params: Params = {}
    for name, leaf in flat.items():
        *parents, last = info[name].path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return params


def matches(pattern: str, name: str) -> bool:
    """Whether ``optimizer.trainable`` names this parameter."""
    return re.fullmatch(pattern, name) is not None


def trainable(info: Mapping[str, ParamInfo], pattern: str) -> list[str]:
    """The names of the parameters that gradients train.

    Raises:
        InputError: there are none.
    """
    names = [n for n, p in info.items() if not p.gradient_free and matches(pattern, n)]
    if not names:
        raise InputError(
            f"optimizer.trainable={pattern!r} matches no parameter, so nothing would be trained; a "
            f"parameter is called, for example, {', '.join(list(info)[:3])}"
        )
    return names


def matrices(info: Mapping[str, ParamInfo]) -> dict[str, Matrix]:
    """The parameters that Muon trains: hidden matrices.

    Embeddings and output heads (what has a ``vocab`` axis), norms, biases, convolutions and
    anything that is not a matrix by its logical axes (see :func:`.muon.as_matrix`) are AdamW's.
    """
    found = {}
    for name, param in info.items():
        hidden = "vocab" not in param.axes and not _NOT_A_MATRIX.search(name)
        matrix = as_matrix(param.axes) if hidden else None
        if matrix is not None:
            found[name] = matrix
    return found


def decays(name: str) -> bool:
    """Whether weight decay applies: to all but the decay gates' ``A_log`` and ``dt_bias``."""
    return name.rpartition(".")[2] not in _NO_DECAY


class OptimizerState(NamedTuple):
    """Moments of the two parts, keyed by parameter names, and the number of steps taken.

    ``count`` is the schedule's; a skipped step counts. The moments' own counts are of updates.
    """

    count: Int[Array, ""]
    adamw: optax.ScaleByAdamState
    muon: Any


def make_optimizer(
    config: AdamW | Muon, schedule: optax.Schedule, info: Mapping[str, ParamInfo]
) -> optax.GradientTransformation:
    """The transformation of flat gradients into flat updates, learning rate and decay included.

    ``update`` needs ``params``. Only parameters that :func:`trainable` lists may occur.
    """
    names = trainable(info, config.trainable)
    adamw = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)
    muon, muon_names = optax.identity(), frozenset()
    if isinstance(config, Muon):
        shapes = {n: m for n, m in matrices(info).items() if n in names}
        muon_names = frozenset(shapes)
        muon = scale_by_muon(shapes, config.momentum, config.newton_schulz_steps, config.rms)

    def split(tree: FlatParams) -> tuple[FlatParams, FlatParams]:
        return (
            {n: x for n, x in tree.items() if n not in muon_names},
            {n: x for n, x in tree.items() if n in muon_names},
        )

    def init(params):
        rest, hidden = split(params)
        return OptimizerState(jnp.zeros([], jnp.int32), adamw.init(rest), muon.init(hidden))

    def update(grads, state, params):
        rest, hidden = split(grads)
        rest, adamw_state = adamw.update(rest, state.adamw)
        hidden, muon_state = muon.update(hidden, state.muon)
        rate = schedule(state.count)
        updates = {}
        for name, u in (rest | hidden).items():
            if decays(name):
                u = u + config.weight_decay * params[name]
            updates[name] = -rate * u
        return updates, OptimizerState(optax.safe_increment(state.count), adamw_state, muon_state)

    return optax.GradientTransformation(init, update)


def global_norm(flat: Mapping[str, Array]) -> Float[Array, ""]:
    """The Euclidean norm of all arrays together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in flat.values()))
