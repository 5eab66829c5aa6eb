"""AutoDeco: the published loss, what the estimators converge to, and runs on a frozen model."""

import dataclasses
import functools
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import jaxalope
from jaxalope.configs import AdamW, AutoDeco, Constant
from jaxalope.configs.overlay import overlay
from jaxalope.configs.registry import get_experiment
from jaxalope.errors import InputError
from jaxalope.layers.decoding_heads import DecodingHeads, TempHead, soft_top_p
from jaxalope.model import DecodingHeadsConfig, attach
from jaxalope.model.checkpoint import restore_params
from jaxalope.sharding import MeshConfig, make_mesh, path_name, split
from jaxalope.train.autodeco import token_losses
from jaxalope.train.loop import train
from jaxalope.train.metrics import read_metrics
from jaxalope.train.objectives import make_objective
from jaxalope.train.optimizers import flatten
from jaxalope.train.step import (
    batch_sharding,
    init_state,
    make_eval_step,
    make_train_step,
    summarise,
    use_mesh,
)
from jaxalope.train.sums import row_uniform, shift, with_row_keys

pytestmark = pytest.mark.long

KEY = jax.random.key(0)
TRAINABLE = r"decoding_heads\..*"


# ------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-9)])
def test_losses_and_gradients_are_the_published_ones(fixtures, dtype, rtol):
    with np.load(fixtures / "autodeco" / "soft_topp.npz") as file:
        golden = dict(file)
    with jax.enable_x64(dtype == "float64"):
        logits, t, p = (jnp.asarray(golden[n][:, :-1], dtype) for n in ("logits", "T", "P"))
        labels, u = jnp.asarray(golden["labels"][:, 1:], jnp.int32), jnp.asarray(golden["u"], dtype)
        valid = labels != -100

        def losses(t, p):
            x = token_losses(AutoDeco(), logits, labels, t[..., 0], p[..., 0], u)
            sums = {n: jnp.sum(jnp.where(valid, v, 0)) for n, v in x.items()}
            first = sums["temperature_loss"] / sums["temperature_weight"]
            return (first, sums["top_p_loss"] / valid.sum()), x["kept"]

        (temperature_loss, top_p_loss), kept = jax.jit(losses)(t, p)
        np.testing.assert_allclose(temperature_loss, golden["temp_loss"], rtol=rtol)
        np.testing.assert_allclose(top_p_loss, golden["topp_loss"], rtol=rtol)
        np.testing.assert_array_equal(kept * valid, golden["temp_keep"])
        grads = jax.jit(jax.jacrev(lambda t, p: losses(t, p)[0], argnums=(0, 1)))(t, p)
        for got, name in (
            (grads[0][0], "grad_T_of_temp_loss"),
            (grads[1][0], "grad_T_of_topp_loss"),
            (grads[1][1], "grad_P_of_topp_loss"),
        ):
            # Gradients of the last position, which has no label, are 0 in the golden.
            wanted = golden[name]
            assert not wanted[:, -1].any()
            # Slopes are differences of numbers as large as the largest, give or take; in float32
            # that rounding is what is left of a small one.
            atol = 2 * rtol * np.abs(wanted).max()
            np.testing.assert_allclose(got, wanted[:, :-1], rtol=rtol, atol=atol)


def _expected(config, logits, q, t, p):
    """The objective of one context in expectation over the label and the draw, exactly."""
    ids = jnp.arange(len(q))

    def at(u):
        x = token_losses(
            config,
            jnp.broadcast_to(logits, (len(q), len(q))),
            ids,
            jnp.full(len(q), t),
            jnp.full(len(q), p),
            jnp.full(len(q), u),
        )
        return jnp.dot(q, x["temperature_loss"]), jnp.dot(q, x["top_p_loss"])

    dropped, kept = at(0.0), at(0.99)
    d = config.easy_drop
    return [d * a + (1 - d) * b for a, b in zip(dropped, kept, strict=True)]


def test_what_the_estimators_are_minimal_at():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=12) * 1.5)
        t, p = 0.7, 0.8

        @functools.cache
        def jacobian(config):
            by = jax.jacrev(lambda t, p, q: _expected(config, logits, q, t, p), argnums=(0, 1))
            return jax.jit(lambda q, t, p: by(t, p, q))

        def slopes(config, q, at=(t, p)):
            """Of the temperature term by T, and of the term of p~ by both."""
            by = jacobian(config)(q, *at)
            return np.array([by[0][0], by[1][0], by[1][1]])

        truncated, whole = soft_top_p(logits, t, p), jax.nn.softmax(logits / t)
        published = AutoDeco()
        plain = AutoDeco(easy_drop=0.0, dft_weight=False)
        weighted = AutoDeco(easy_drop=0.0)
        likelihood = AutoDeco(estimator="likelihood")
        for conditional in (
            AutoDeco(estimator="conditional"),
            AutoDeco(estimator="conditional", easy_drop=0.0),
            AutoDeco(estimator="conditional", dft_weight=False),
        ):
            np.testing.assert_allclose(slopes(conditional, truncated)[1:], 0, atol=2e-6)
            # And it is no constant: elsewhere it falls towards there.
            assert np.abs(slopes(conditional, truncated, (0.9, p))[1]) > 1e-3
            assert np.abs(slopes(conditional, truncated, (t, 0.6))[2]) > 1e-3
        np.testing.assert_allclose(slopes(likelihood, truncated)[1:], 0, atol=2e-6)
        # Two terms: right for a tempered law without dropping and weight, and else wrong.
        np.testing.assert_allclose(slopes(plain, whole)[0], 0, atol=2e-6)
        assert np.abs(slopes(plain, truncated)[0]) > 1e-2
        assert slopes(published, whole)[0] > 1e-2
        assert np.abs(slopes(published, truncated)[1:]).min() > 1e-2
        # The weight alone deflates by a known law.
        np.testing.assert_allclose(slopes(weighted, whole, (t / (1 + t), p))[0], 0, atol=2e-6)


@pytest.mark.parametrize(
    ("config", "corr", "error"),
    [
        (AutoDeco(easy_drop=0.0, dft_weight=False), 0.93, 0.12),
        (AutoDeco(), 0.8, None),
        (AutoDeco(estimator="conditional"), 0.93, 0.12),
    ],
    ids=["plain", "published", "conditional"],
)
def test_recovers_the_true_temperature(config, corr, error):
    """Labels from ``softmax(l / T*(h))``. Seeds are fixed; 5 others gave corr .97, .94, .96 or more
    and errors of .08, -, .09 or less (``bench/autodeco.py``), far from the bounds.
    """
    w = 0.6 * jax.random.normal(jax.random.key(1), (16, 32))
    direction = 0.5 * jax.random.normal(jax.random.key(2), (16,))
    graphdef, params = split(TempHead(16, 64, rngs=nnx.Rngs(0)))
    adam = optax.adam(2e-3)

    def draw(key, count):
        of_h, of_label = jax.random.split(key)
        h = jax.random.normal(of_h, (count, 16))
        truth = 0.4 + 1.2 * jax.nn.sigmoid(h @ direction)
        return h, h @ w, jax.random.categorical(of_label, h @ w / truth[:, None]), truth

    def loss(params, key):
        h, logits, labels, _ = draw(key, 512)
        t = nnx.merge(graphdef, params)(h[None])[0]
        u = jax.random.uniform(jax.random.fold_in(key, 1), (512,))
        x = token_losses(config, logits, labels, t, jnp.ones(512), u)
        if config.estimator == "published":
            return x["temperature_loss"].sum() / x["temperature_weight"].sum()
        return x["top_p_loss"].mean()

    def step(carry, key):
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, adam.init(params))
    params = jax.jit(lambda keys: jax.lax.scan(step, start, keys)[0][0])(jax.random.split(KEY, 600))
    h, _, _, truth = draw(jax.random.key(3), 4096)
    found = nnx.merge(graphdef, params)(h[None])[0]
    assert np.corrcoef(found, truth)[0, 1] >= corr
    if error is not None:
        assert np.abs(found - truth).mean() <= error


# ---------------------------------------------------------------------------------- the objective


@pytest.fixture(scope="module")
def model(toy):
    """A toy model with heads that say something else of every token."""
    module = attach(toy.build(KEY), [DecodingHeadsConfig(width=8)], KEY)
    graphdef, params = split(module)
    heads = params["decoding_heads"]
    leaves, tree = jax.tree.flatten(heads)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params["decoding_heads"] = jax.tree.map(jnp.add, heads, jax.tree.unflatten(tree, noise))
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="module")
def batch_of(toy, model):
    """``batch_of(seed)``: every other token is the one that the toy ranks first after the last."""
    every = model.hidden_states(jnp.arange(toy.vocab_size)[None])[0]
    following = np.asarray(jnp.argmax(model.logits(every)[0], -1))

    def batch_of(seed=0):
        batch = toy.batch(seed=seed)
        batch["tokens"][:, 1::2] = following[batch["tokens"][:, :-1:2]]
        return batch

    return batch_of


def _oracle(model, batch, u, easy_drop=0.6, sharpness=30.0):
    """Token by token in float64: sums over kept and over valid positions, and the counts."""
    hidden = model.hidden_states(batch["tokens"])[0]
    logits = model.logits(hidden)
    heads = np.asarray(model.decoding_heads(hidden, logits), np.float64)
    logits = np.asarray(logits, np.float64)
    weights = batch.get("loss_weights", np.ones(batch["tokens"].shape))
    first = second = kept_weight = valid_weight = 0.0
    for r, t in np.ndindex(*batch["tokens"].shape):
        if t + 1 == batch["tokens"].shape[1]:
            continue
        segment = batch["segment_ids"][r, t]
        if segment == 0 or batch["segment_ids"][r, t + 1] != segment:
            continue
        y, w = batch["tokens"][r, t + 1], weights[r, t + 1]
        x, (temperature, top_p) = logits[r, t], heads[:, r, t]
        base = np.exp(x - x.max())
        b = base[y] / base.sum()
        tempered = np.exp((x - x.max()) / temperature)
        tempered /= tempered.sum()
        if y != x.argmax() or u[r, t] >= easy_drop:
            first += w * b * -np.log(tempered[y])
            kept_weight += w
        masked, mass = np.zeros_like(x), 0.0
        for i in np.argsort(-tempered, kind="stable"):
            mass += tempered[i]
            masked[i] = tempered[i] * np.exp(-sharpness * max(mass - top_p, 0))
        second += w * b * -np.log(masked[y] / (masked.sum() + 1e-9) + 1e-9)
        valid_weight += w
    return first, kept_weight, second, valid_weight


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_of_a_token_by_token_oracle(batch_of, model, weighted):
    batch = with_row_keys(batch_of(), KEY)
    if weighted:
        rng = np.random.default_rng(1)
        batch["loss_weights"] = rng.integers(0, 3, (8, 8)).astype(np.float32) / 2
    expected = _oracle(model, batch, np.asarray(row_uniform(batch, KEY)))
    loss, weight, sums = jax.jit(lambda b: make_objective(AutoDeco())(model, b, KEY))(batch)
    first, kept = sums["terms"]["temperature_loss"]
    np.testing.assert_allclose((first, kept, loss, weight), expected, rtol=2e-5)
    assert 0 < kept < weight
    assert sums["stats"]["block"]["router"]["bias"].shape == (2, 4)
    means = summarise({"loss": loss, "weight": weight, **sums, "stats": 0})
    np.testing.assert_allclose(means["loss"], first / kept + loss / weight, rtol=1e-6)
    np.testing.assert_allclose(means["temperature_loss"], first / kept, rtol=1e-6)


def _gradients(graphdef, batch, max_logits, estimator="published"):
    """A function from parameters to the sums and their gradient by the heads' parameters."""
    objective = make_objective(AutoDeco(max_logits=max_logits, estimator=estimator))

    def loss(heads, params):
        module = nnx.merge(graphdef, params | {"decoding_heads": heads})
        loss, _, sums = objective(module, batch, KEY)
        first, _ = sums.get("terms", {"temperature_loss": (0, 0)})["temperature_loss"]
        sums.pop("stats")
        return loss + 2 * first, sums

    return lambda params: jax.grad(loss, has_aux=True)(params["decoding_heads"], params)


@pytest.mark.parametrize("estimator", ["published", "likelihood", "conditional"])
def test_gradients_are_those_of_autodiff_through_the_formula_and_chunks_change_nothing(
    batch_of, model, estimator
):
    batch = with_row_keys(batch_of(), KEY)
    graphdef, params = split(model)
    whole = jax.jit(_gradients(graphdef, batch, 2**27, estimator))(params)
    chunked = jax.jit(_gradients(graphdef, batch, 8 * 18 * 32 * 2, estimator))(params)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
    jax.tree.map(close, whole, chunked)

    def plainly(heads):
        module = nnx.merge(graphdef, params | {"decoding_heads": heads})
        targets, weights = shift(batch)
        hidden = module.hidden_states(batch["tokens"])[0]
        logits = module.logits(hidden)
        config, u = AutoDeco(estimator=estimator), row_uniform(batch, KEY)
        x = token_losses(config, logits, targets, *module.decoding_heads(hidden, logits), u)
        first = jnp.sum(weights * x["temperature_loss"]) if estimator == "published" else 0
        return 2 * first + jnp.sum(weights * x["top_p_loss"])

    jax.tree.map(close, whole[0], jax.jit(jax.grad(plainly))(params["decoding_heads"]))


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for sub in jaxprs_in_params(equation.params):
            yield from _sizes(sub)


def test_no_pass_holds_more_logits_than_asked_for(toy, model):
    batch = with_row_keys(toy.batch(length=32), KEY)
    graphdef, params = split(model)

    def largest(limit):
        grad = jax.make_jaxpr(_gradients(graphdef, batch, limit))(params)
        return max(_sizes(grad.jaxpr))

    assert largest(2**27) >= 8 * 32 * 32
    # A sixteenth of the sequence at a time; the largest left is the toy's own activations.
    activations = 8 * 32 * 4 * 8 * 2
    assert largest(8 * 18 * 32 * 2) <= activations < 8 * 32 * 32 * 8


def test_rows_draw_the_same_however_they_are_taken(toy):
    batch = with_row_keys(toy.batch(), KEY)
    whole = row_uniform(batch, KEY)
    part = {name: x[1::4] for name, x in batch.items()}
    np.testing.assert_array_equal(row_uniform(part, jax.random.key(9)), whole[1::4])
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(row_uniform(toy.batch(), KEY), whole)


# --------------------------------------------------------------------------------------- the step


@pytest.fixture(scope="module")
def steps(toy, batch_of):
    """``steps(experiment, on_mesh)``: the states before and after 3 steps, and their metrics."""

    def steps(experiment, on_mesh=False):
        mesh = make_mesh(experiment.mesh) if on_mesh else None
        graphdef, state = init_state(experiment, mesh, build=toy.build)
        before, metrics = jax.device_get(state), []
        step = make_train_step(experiment, graphdef)
        for seed in range(3):
            batch = batch_of(seed)
            if mesh is None:
                state, m = step(state, batch)
            else:
                batch = jax.device_put(batch, batch_sharding(experiment, mesh))
                with use_mesh(mesh, experiment.rules):
                    state, m = step(state, batch)
            metrics.append(jax.device_get(m))
        return before, jax.device_get(state), metrics

    return steps


@pytest.fixture(scope="module")
def experiment(toy):
    return toy.experiment(
        objective=AutoDeco(max_logits=8 * 18 * 32 * 4),
        retrofits=(DecodingHeadsConfig(width=8),),
        optimizer=AdamW(weight_decay=0.1, trainable=TRAINABLE),
        schedule=Constant(learning_rate=1e-2),
    )


@pytest.fixture(scope="module")
def alone(steps, experiment):
    return steps(experiment)


def _close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_a_frozen_base_stays_byte_identical_while_every_head_parameter_learns(alone):
    before, after, metrics = alone
    old, new = flatten(before.params), flatten(after.params)
    changed = {n for n in old if old[n].tobytes() != new[n].tobytes()}
    # The first layers get their gradient through the last ones, which begin at zero.
    assert changed == {n for n in old if n.startswith("decoding_heads.")}
    assert set(after.opt_state.adamw.mu) == changed
    for m in metrics:
        np.testing.assert_allclose(m["loss"], m["temperature_loss"] + m["top_p_loss"], rtol=1e-6)
        assert m["finite"] and 0 < m["kept"] <= 1
    np.testing.assert_allclose(metrics[0]["temperature"], 1, rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["nll"], metrics[0]["base_nll"], rtol=1e-6)


def test_accumulated_equals_the_whole_batch_dropping_included(alone, steps, experiment):
    train = dataclasses.replace(experiment.train, accumulation=4)
    _, state, metrics = steps(dataclasses.replace(experiment, train=train))
    assert metrics[0]["kept"] < 1
    _close(alone[2], metrics, rtol=1e-5)
    _close(alone[1].params, state.params, atol=2e-6)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=4, fsdp=2, explicit=False)]
)
def test_sharded_equals_one_device(alone, steps, experiment, mesh):
    train = dataclasses.replace(experiment.train, accumulation=2 if mesh.explicit else 1)
    _, state, metrics = steps(dataclasses.replace(experiment, mesh=mesh, train=train), True)
    _close(alone[2], metrics, rtol=2e-5)
    _close(alone[1].params, state.params, atol=5e-6)


def test_an_evaluation_adds_up_over_batches(toy, batch_of, experiment, alone):
    graphdef, _ = init_state(experiment, build=toy.build)
    measure = make_eval_step(experiment, graphdef)
    one, two = (measure(alone[1].params, batch_of(i)) for i in (0, 1))
    means = summarise(jax.tree.map(jnp.add, one, two))
    first, kept = one["terms"]["temperature_loss"]
    more, others = two["terms"]["temperature_loss"]
    rest = (one["loss"] + two["loss"]) / (one["weight"] + two["weight"])
    np.testing.assert_allclose(means["loss"], (first + more) / (kept + others) + rest, rtol=1e-6)


def test_only_heads_may_be_trained(toy, experiment):
    with pytest.raises(
        InputError, match=r"optimizer.trainable='\.\*' would train A_log|would train"
    ):
        init_state(dataclasses.replace(experiment, optimizer=AdamW()), build=toy.build)


# ---------------------------------------------------------------------------------------- the run

ONE = jax.devices()[:1]
SETTINGS = [
    "name=heads",
    "objective=autodeco",
    "retrofits=decoding_heads",
    "retrofits.0.width=8",
    rf"optimizer.trainable={TRAINABLE}",
    "train.log_every=1",
    "train.eval_every=none",
    "train.steps=6",
    "schedule.learning_rate=1e-2",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """``(experiment, workdir)`` of a finished run without heads."""
    bigram = get_experiment(str(pathlib.Path(__file__).parent / "bigram.py"))
    bigram = overlay(bigram, ["train.steps=2", "schedule.warmup_steps=0", "train.eval_every=none"])
    path = tmp_path_factory.mktemp("base")
    train(bigram, path, devices=ONE, quiet=True)
    return bigram, path


@pytest.fixture(scope="module")
def heads(base, tmp_path_factory):
    """``(experiment, workdir, result)`` of a run that trained heads on ``base``."""
    experiment = overlay(base[0], [*SETTINGS, f"init_from={base[1]}"])
    path = tmp_path_factory.mktemp("heads")
    return experiment, path, train(experiment, path, devices=ONE, quiet=True)


def _flat(params):
    leaves = jax.tree.leaves_with_path(params)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def test_load_gives_the_base_byte_for_byte_and_the_trained_heads(base, heads):
    _, workdir, result = heads
    model, plain = jaxalope.load(workdir), jaxalope.load(base[1])
    ours, theirs = _flat(model.params), _flat(plain.params)
    assert all(ours[n].tobytes() == x.tobytes() for n, x in theirs.items())
    trained = _flat(result.state.params)
    assert ours.keys() == trained.keys() > theirs.keys()
    assert all(np.array_equal(ours[n], x) for n, x in trained.items())
    module, tokens = model.module(), jnp.arange(8)[None]
    hidden = module.hidden_states(tokens)[0]
    temperature, top_p = module.decoding_heads(hidden, module.logits(hidden))
    assert np.ptp(temperature) > 1e-4 and np.ptp(top_p) > 1e-4
    assert not hasattr(plain.module(), "decoding_heads")


def test_training_lowers_the_loss_it_is_about(heads):
    lines = read_metrics(heads[1])
    assert [line["step"] for line in lines] == list(range(1, 7))
    fresh = (lines[0]["temperature"], lines[0]["top_p"])
    assert fresh == pytest.approx((1, 0.95), rel=1e-5)
    assert lines[-1]["temperature_loss"] < lines[0]["temperature_loss"]


def test_stopped_and_resumed_is_the_run_that_was_not_and_needs_the_base_no_more(
    base, heads, tmp_path
):
    experiment, workdir, _ = heads
    copy = tmp_path / "base"
    base[1].rename(copy)
    try:
        first = overlay(experiment, ["train.steps=3", f"init_from={copy}"])
        train(first, tmp_path / "run", devices=ONE, quiet=True)
    finally:
        copy.rename(base[1])
    rest = overlay(first, ["train.steps=6"])
    train(rest, tmp_path / "run", devices=ONE, quiet=True)
    numbers = ("loss", "temperature_loss", "kept", "grad_norm", "param_norm")
    lines, others = read_metrics(tmp_path / "run"), read_metrics(workdir)
    assert [[line[n] for n in numbers] for line in lines] == [
        [line[n] for n in numbers] for line in others
    ]


def test_goes_on_to_a_mesh_that_shards_the_base(heads, tmp_path):
    settings = [f"init_from={heads[1]}", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    experiment = overlay(heads[0], [*settings, "train.steps=1"])
    _, state = init_state(experiment, make_mesh(experiment.mesh))
    ours = _flat(jax.device_get(state.params))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    theirs = _flat(restore_params(heads[1], shapes))
    # A source that has the heads gives them too.
    assert all(np.array_equal(ours[n], theirs[n]) for n in theirs)
    kernel = state.params["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 160)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init_from=nowhere"], r"init_from='nowhere' does not exist; give the workdir"),
        (["init_from=none"], r"init_from=None: objective=autodeco trains heads on a finished"),
        (
            ["model.hidden_size=8"],
            r"holds another model, which differs in model.hidden_size: 16 there, 8 here",
        ),
        (["objective.easy_drop=1"], r"objective.easy_drop=1.0: must be in \[0, 1\)"),
        (["objective.sharpness=0"], r"objective.sharpness=0.0: must be positive"),
        (["retrofits.0.initial_top_p=1.5"], r"initial_top_p=1.5 must be above 0 and below 1"),
        (["optimizer.trainable=.*"], r"optimizer.trainable='.\*' would train embedding"),
    ],
)
def test_what_cannot_be_is_told_before_a_workdir_is_made(heads, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train(overlay(heads[0], settings), tmp_path / "run", devices=ONE, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_source_with_another_tokenizer_or_an_unlisted_retrofit_is_refused(heads, tmp_path):
    experiment, workdir, _ = heads
    settings = ["objective=next_token", "optimizer.trainable=.*"]
    plain = overlay(get_experiment(str(workdir / "experiment.json")), settings)
    plain = dataclasses.replace(plain, retrofits=(), init_from=str(workdir))
    with pytest.raises(InputError, match=r"has a model with DecodingHeadsConfig\(width=8"):
        train(plain, tmp_path / "run", devices=ONE, quiet=True)
    other = tmp_path / "tokenizer"
    other.mkdir()
    words = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    blank = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    text = {"version": "1.0", "added_tokens": [], "truncation": None, "padding": None}
    (other / "tokenizer.json").write_text(json.dumps(text | blank | words))
    changed = overlay(experiment, [f"data.tokenizer={other / 'tokenizer.json'}"])
    with pytest.raises(InputError, match=r"data.tokenizer=.* is not the tokenizer of init_from="):
        train(changed, tmp_path / "run", devices=ONE, quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_setting_of_the_same_shapes_is_only_told(heads, tmp_path):
    experiment = overlay(heads[0], ["model.poison=1"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        init_state(experiment)
    assert any("model.poison: None there, 1 here" in str(w.message) for w in seen)


def test_the_demo_says_where_its_base_comes_from():
    demo = get_experiment("autodeco_demo")
    assert demo.init_from == "runs/demo" and demo.model == get_experiment("demo").model
    assert demo.data == get_experiment("demo").data
    with pytest.raises(
        InputError, match="objective=autodeco trains decoding heads; set retrofits="
    ):
        dataclasses.replace(demo, retrofits=())


def test_heads_of_a_module_are_the_layers_own(model):
    assert isinstance(model.decoding_heads, DecodingHeads)
