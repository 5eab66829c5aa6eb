"""The train step: a pure function from a state and a batch to the next state and its metrics.

Where arrays are sharded, call everything inside ``use_mesh(mesh, experiment.rules)``.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from ..configs.experiment import Experiment
from ..configs.objectives import AutoDeco, NextVector
from ..errors import InputError
from ..model.registry import build_model
from ..model.retrofit import attach
from ..sharding import (
    Params,
    init_compiler_options,
    param_axes,
    shardings,
    split,
    use_mesh,
)
from .init_from import load_base
from .layout import place_param, replicate, split_rows
from .objectives import make_draw, make_objective
from .optimizers import (
    ParamInfo,
    flatten,
    global_norm,
    make_optimizer,
    matches,
    param_info,
    trainable,
    unflatten,
)
from .schedules import make_schedule
from .sums import Batch

Build = Callable[[jax.Array], nnx.Module]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training carries from step to step.

    Attributes:
        step: int32 scalar, the number of optimizer steps taken.
        params: nested dict of float32 arrays.
        opt_state: an ``OptimizerState``; its moments are dicts keyed by parameter names.
        ema: an average of ``params`` in the same shape, or None.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None


# ----------------------------------------------------------------------------------------- state


def init_state(
    experiment: Experiment, mesh: Mesh | None = None, *, build: Build | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """``(graphdef, state)`` at step 0, every array created on its own shard.

    Args:
        experiment: its settings; the values depend on ``train.seed`` and not on the mesh.
        mesh: of ``make_mesh(experiment.mesh)``; None is one device.
        build: makes the module from a key in place of ``build_model``; retrofits come on top.

    Raises:
        InputError: a parameter or the batch does not divide over the mesh, or ``init_from`` holds
            no model that fits.
    """
    graphdef, abstract = abstract_state(experiment, mesh, build=build)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    base = load_base(experiment, flatten(abstract.params))
    # What is loaded is handed through; only what is new is drawn.
    init = jax.jit(
        _init_fn(experiment, build),
        out_shardings=places,
        donate_argnums=1,
        compiler_options=init_compiler_options(),
    )
    key = jax.random.key(experiment.train.seed)
    if mesh is None:
        return graphdef, init(key, base)
    with use_mesh(mesh, experiment.rules):
        return graphdef, init(key, base)


def abstract_state(
    experiment: Experiment, mesh: Mesh | None = None, *, build: Build | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """What :func:`init_state` returns, with ``ShapeDtypeStruct`` leaves that carry shardings.

    Nothing is allocated. A moment lies where its parameter lies.
    """
    if mesh is not None:
        check_batch(experiment, mesh)
    make = _module_fn(experiment, build)
    module = nnx.eval_shape(lambda: make(jax.random.key(0)))
    graphdef, params = split(module)
    init = _init_fn(experiment, build)
    # The key is made inside: the mesh's devices may be absent.
    state = jax.eval_shape(lambda: init(jax.random.key(0), {}))
    if mesh is None:
        everywhere, places = SingleDeviceSharding(jax.devices()[0]), {}
    else:
        everywhere = NamedSharding(mesh, PartitionSpec())
        places = flatten(shardings(params, param_axes(module), mesh, experiment.rules))
        _warn_of_idle_axes(experiment, mesh, places.values())

    def locate(path, leaf):
        where = places.get(_param_of(path, places), everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return graphdef, jax.tree.map_with_path(locate, state)


def _warn_of_idle_axes(experiment, mesh: Mesh, places: Iterable[NamedSharding]) -> None:
    """Of mesh axes along which all devices do the same work."""
    specs = [experiment.rules.spec(("batch", "seq"), mesh.axis_names), *(x.spec for x in places)]
    used = set(jax.tree.leaves([list(spec) for spec in specs]))
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            warnings.warn(
                f"mesh.{axis}={size}: nothing of this experiment is split over it, so {size} "
                f"devices do the work of one; set mesh.{axis}=1, or rules that name it "
                "(rules.seq=context splits the sequence)",
                stacklevel=3,
            )


def _module_fn(experiment: Experiment, build: Build | None) -> Build:
    """The experiment's module from a key, retrofits and all."""
    make = build or functools.partial(build_model, experiment.model)
    return lambda key: attach(make(key), experiment.retrofits, key)


def _init_fn(experiment: Experiment, build: Build | None) -> Callable[..., TrainState]:
    make = _module_fn(experiment, build)

    def init(key, base):
        module = make(key)
        info, params = param_info(module), split(module)[1]
        params = unflatten(flatten(params) | base, info)
        optimizer = make_optimizer(experiment.optimizer, _schedule(experiment), info)
        return TrainState(
            step=jnp.zeros([], jnp.int32),
            params=params,
            opt_state=optimizer.init(_trained(experiment, info, flatten(params))),
            ema=None if experiment.train.ema_decay is None else params,
        )

    return init


def _param_of(path: tuple, names: Mapping[str, Any]) -> str | None:
    """The parameter that a leaf of the state belongs to, by its path; None if to none."""
    keys = [getattr(k, "key", getattr(k, "name", k)) for k in path]
    for start in range(len(keys)):
        name = ".".join(str(k) for k in keys[start:])
        if name in names:
            return name
    return None


def check_batch(experiment: Experiment, mesh: Mesh) -> None:
    """Raise an :class:`InputError` unless a microbatch divides over the mesh."""
    rows = experiment.data.batch_size // experiment.train.accumulation
    length = experiment.data.sequence_length
    batch, seq = experiment.rules.spec(("batch", "seq"), mesh.axis_names)
    for what, size, entry in (
        (
            f"data.batch_size={experiment.data.batch_size} / train.accumulation="
            f"{experiment.train.accumulation} = {rows} rows",
            rows,
            batch,
        ),
        (f"data.sequence_length={length}", length, seq),
    ):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        for axis in axes:
            if size % mesh.shape[axis]:
                sizes = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
                raise InputError(
                    f"{what} does not divide over the mesh axes {sizes}; change it, or mesh.{axis}"
                )
            size //= mesh.shape[axis]


def batch_sharding(experiment: Experiment, mesh: Mesh) -> NamedSharding:
    """Where a batch's ``[B, T]`` arrays lie."""
    return NamedSharding(mesh, experiment.rules.spec(("batch", "seq"), mesh.axis_names))


# ------------------------------------------------------------------------------------------ step


def make_train_step(
    experiment: Experiment, graphdef: nnx.GraphDef
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted ``(state, batch) -> (state, metrics)``; donates ``state``.

    ``batch`` holds the global batch's ``[B, T]`` arrays. Metrics are float32 scalars of this step:
    ``loss``, the objective's own (``nll``, ``accuracy``, ``z_loss``) as means over ``weight``, each
    further term of the loss as a mean over its own weight, ``grad_norm`` before clipping,
    ``param_norm`` after the update, ``lr``, ``load_imbalance`` (the busiest expert's load over the
    mean one, of the worst router) and the bool ``finite``. Where that is False, the loss or the
    gradient was not, and the state is returned as it came.
    """
    config = experiment.train
    objective, schedule = make_objective(experiment.objective), _schedule(experiment)
    draw = make_draw(experiment.objective)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        module = nnx.merge(graphdef, state.params)
        info = param_info(module)
        optimizer = make_optimizer(experiment.optimizer, schedule, info)
        flat = flatten(state.params)
        trained = _trained(experiment, info, flat)

        def loss_fn(trained, batch, key):
            model = nnx.merge(graphdef, unflatten(flat | trained, info))
            loss, weight, sums = objective(model, batch, key)
            stats = flatten(sums.pop("stats", {}))
            sums = {"loss": loss, "weight": weight, **sums, "stats": stats}
            further = {name: term for name, (term, _) in sums.get("terms", {}).items()}
            return {"loss": loss, **further}, jax.tree.map(replicate, sums)

        key = jax.random.fold_in(_data_key(config.seed), state.step)
        batch = draw(module, batch, key)
        grads, sums = _accumulate(loss_fn, trained, batch, key, config.accumulation)
        stats = sums.pop("stats")
        metrics = summarise(sums)
        weights = {"loss": sums["weight"]} | {n: w for n, (_, w) in sums.get("terms", {}).items()}
        grads = {
            name: sum(grads[term][name] / _positive(weight) for term, weight in weights.items())
            for name in trained
        }

        norm = global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        if config.clip_norm is not None:
            shrink = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
            grads = {n: g * shrink for n, g in grads.items()}

        def update(state: TrainState) -> TrainState:
            flat = flatten(state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, flat)
            new = flat | {n: flat[n] + u for n, u in updates.items()}
            new |= _balance(experiment, state.step, info, flat, stats)
            new = {n: place_param(x, info[n].axes) for n, x in new.items()}
            ema = state.ema
            if ema is not None:
                d = config.ema_decay
                # In this form what does not change is averaged to itself, to the bit.
                average = {n: e + (1 - d) * (new[n] - e) for n, e in flatten(ema).items()}
                ema = unflatten({n: place_param(x, info[n].axes) for n, x in average.items()}, info)
            return TrainState(
                step=state.step + 1,
                params=unflatten(new, info),
                opt_state=_place_moments(opt_state, info),
                ema=ema,
            )

        # A branch rather than a choice in every element: XLA then updates the state in place,
        # where it would copy moments that both the old and the new state are made from.
        after = jax.lax.cond(finite, update, lambda state: state, state)
        metrics |= {
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": norm,
            "param_norm": global_norm(flatten(after.params)),
            "finite": finite,
        }
        if stats:
            worst = [jnp.max(s.max(-1) / _positive(s.mean(-1))) for s in stats.values()]
            metrics["load_imbalance"] = functools.reduce(jnp.maximum, worst)
        return after, metrics

    return jax.jit(train_step, donate_argnames="state")


def _accumulate(loss_fn, trained, batch: Batch, key: jax.Array, parts: int):
    """Every loss term's gradient, and the sums, of the whole batch in ``parts`` microbatches."""

    def grad_fn(batch, key):
        terms, pull_back, sums = jax.vjp(
            lambda trained: loss_fn(trained, batch, key), trained, has_aux=True
        )

        def gradient(term):
            return pull_back({n: jnp.full_like(x, n == term) for n, x in terms.items()})[0]

        return {term: gradient(term) for term in terms}, sums

    def zeros(batch, key):
        terms, sums = jax.eval_shape(loss_fn, trained, batch, key)
        gradient = {n: jnp.zeros_like(x, jnp.float32) for n, x in trained.items()}
        return {term: gradient for term in terms}, _zeros(sums)

    return _sum_over_parts(grad_fn, zeros, batch, key, parts)


def _sum_over_parts(
    fn: Callable[[Batch, jax.Array], Any],
    zeros: Callable[[Batch, jax.Array], Any],
    batch: Batch,
    key: jax.Array,
    parts: int,
) -> Any:
    """The sum of ``fn(microbatch, key)`` over ``parts`` microbatches, one after the other.

    Args:
        fn: to a pytree of arrays.
        zeros: what the sum begins with, from the first microbatch and its key.
        batch: whole, with all that is drawn for it.
        key: each microbatch gets one of its own.
        parts: divides the rows.
    """
    if parts == 1:
        return fn(batch, jax.random.fold_in(key, 0))
    micro = {name: split_rows(x, parts) for name, x in batch.items()}

    def body(total, part):
        i, batch = part
        return jax.tree.map(jnp.add, total, fn(batch, jax.random.fold_in(key, i))), None

    start = zeros({name: x[0] for name, x in micro.items()}, key)
    return jax.lax.scan(body, start, (jnp.arange(parts), micro))[0]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _balance(
    experiment: Experiment,
    step: Int[Array, ""],
    info: Mapping[str, ParamInfo],
    flat: Mapping[str, Array],
    loads: Mapping[str, Array],
) -> dict[str, Array]:
    """The balancing biases after this batch, by its expert loads (Moonlight's form).

    ``b += rate * (sign(e) - mean(sign(e)))`` with ``e`` the mean load less the expert's: loss-free
    balancing (arXiv 2408.15664) whose biases keep their sum.
    """
    config = experiment.train
    names = [
        n for n, p in info.items() if p.gradient_free and matches(experiment.optimizer.trainable, n)
    ]
    if not names or not config.balance_rate:
        return {}
    rate = jnp.float32(config.balance_rate)
    if config.balance_steps is not None:
        rate = jnp.where(step < config.balance_steps, rate, 0)
    biases = {}
    for name in names:
        if name not in loads:
            raise TypeError(
                f"parameter {name} is learnt without a gradient, and the model returned no "
                f"statistics for it; there are some for {sorted(loads)}"
            )
        load = loads[name]
        sign = jnp.sign(load.mean(-1, keepdims=True) - load)
        change = rate * (sign - sign.mean(-1, keepdims=True))
        biases[name] = flat[name] + place_param(change, info[name].axes)
    return biases


def _place_moments(opt_state: Any, info: Mapping[str, ParamInfo]) -> Any:
    def place(path, leaf):
        name = _param_of(path, info)
        return leaf if name is None else place_param(leaf, info[name].axes)

    return jax.tree.map_with_path(place, opt_state)


def _trained(experiment: Experiment, info: Mapping[str, ParamInfo], flat: Mapping[str, Any]):
    names = trainable(info, experiment.optimizer.trainable)
    if isinstance(experiment.objective, NextVector):
        # As below; and what an autoencoder makes of a chunk must stay what the head is taught.
        others = [n for n in names if n.startswith("autoencoder.")]
        if others:
            raise InputError(
                f"optimizer.trainable={experiment.optimizer.trainable!r} would train {others[0]}, "
                "and objective=next_vector leaves the autoencoder as it is; set "
                r"optimizer.trainable='(?!autoencoder\.).*'"
            )
    if isinstance(experiment.objective, AutoDeco):
        # The objective has no gradient for them; weight decay would still move them.
        others = [n for n in names if not n.startswith("decoding_heads.")]
        if others:
            raise InputError(
                f"optimizer.trainable={experiment.optimizer.trainable!r} would train {others[0]}, "
                "and objective=autodeco trains decoding heads only; set optimizer.trainable="
                r"'decoding_heads\..*'"
            )
    return {n: flat[n] for n in names}


def _schedule(experiment: Experiment):
    return make_schedule(experiment.schedule, experiment.train.steps)


def _data_key(seed: int) -> jax.Array:
    """A key apart from the one that the parameters are drawn from."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def _positive(x: jax.Array) -> jax.Array:
    """``x``, or 1 where it is 0: a batch without targets has a loss of 0."""
    return jnp.where(x > 0, x, 1)


# ------------------------------------------------------------------------------------------ eval


def make_eval_step(
    experiment: Experiment, graphdef: nnx.GraphDef
) -> Callable[..., dict[str, jax.Array]]:
    """The jitted ``(params, batch, number) -> sums``: add them up, then :func:`summarise`.

    ``batch`` holds as many rows as one of training (``train.accumulation`` has to divide them), and
    is taken in as many parts: what fits for training fits here. Random objectives draw the same
    numbers for it at every evaluation, however many parts there are, and others for each
    ``number``.
    """
    config = experiment.train
    objective = make_objective(experiment.objective, training=False)
    draw = make_draw(experiment.objective)

    def eval_step(params: Params, batch: Batch, number: int = 0) -> dict[str, jax.Array]:
        model, key = nnx.merge(graphdef, params), _data_key(config.seed)
        key = jax.random.fold_in(key, number)

        def measure(batch, key):
            loss, weight, sums = objective(model, batch, key)
            sums.pop("stats", None)
            return jax.tree.map(replicate, {"loss": loss, "weight": weight, **sums})

        def zeros(batch, key):
            return _zeros(jax.eval_shape(measure, batch, key))

        return _sum_over_parts(measure, zeros, draw(model, batch, key), key, config.accumulation)

    return jax.jit(eval_step)


def summarise(sums: Mapping[str, jax.Array]) -> Metrics:
    """Means over ``weight`` of every other sum; ``weight`` stays (the number of targets).

    A further term of the loss is a mean over its own weight, and added to ``loss``.
    """
    sums = dict(sums)
    terms, weight = sums.pop("terms", {}), sums["weight"]
    means = {n: s if n == "weight" else s / _positive(weight) for n, s in sums.items()}
    for name, (term, own) in terms.items():
        means[name] = term / _positive(own)
        means["loss"] += means[name]
    return means
