"""CALM's two objectives against NumPy, and what its two stages promise each other."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.configs import NextVector, Part, Reconstruction, get_experiment, overlay
from jaxalope.errors import InputError
from jaxalope.model import CALMAutoencoderConfig, CALMConfig, build_model, load
from jaxalope.sharding import MeshConfig, make_mesh, use_mesh
from jaxalope.train.loop import train as train_on
from jaxalope.train.next_vector import next_vector, power_distance
from jaxalope.train.reconstruction import reconstruction
from jaxalope.train.step import batch_sharding, init_state, make_train_step
from jaxalope.train.sums import row_draw, row_uniform

pytestmark = pytest.mark.long

K, ROWS, LENGTH = 4, 4, 24
train = functools.partial(train_on, devices=jax.devices()[:1], quiet=True)
KEY = jax.random.key(7)


def _batch(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, LENGTH), np.int32)
    segments[:, 12:] = 2
    segments[0, 20:] = 0
    # A document's last chunk may hold padding, which is read as it is.
    segments[1, 22:] = 0
    return {
        "tokens": jnp.asarray(rng.integers(0, 320, (rows, LENGTH)), jnp.int32),
        "segment_ids": jnp.asarray(segments),
    }


def _model(head="energy"):
    steps = None if head == "energy" else 4
    config = dataclasses.replace(CALMConfig.tiny(), head=head, head_steps=steps)
    model = build_model(config, jax.random.key(0))
    for path, param in nnx.to_flat_state(nnx.state(model.latent_head)):
        key = jax.random.fold_in(jax.random.key(1), hash(path) % 1000)
        param.set_value(0.2 * jax.random.normal(key, param.get_value().shape))
    return model


# ---------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("training", [True, False])
def test_reconstruction_is_its_definition(training):
    model = build_model(CALMAutoencoderConfig.tiny(), jax.random.key(0))
    config, batch = Reconstruction(kl_weight=0.1, kl_floor=1e-4), _batch()
    loss, weight, metrics = reconstruction(config, model, batch, KEY, training=training)

    tokens, shape = np.asarray(batch["tokens"]), (LENGTH // K, 8)
    keep = np.asarray(row_uniform(batch, KEY)) >= 0.15
    assert 0.5 < keep.mean() < 1
    read = np.where(keep, tokens, 0) if training else tokens
    mean, log_std = (np.asarray(x, np.float64) for x in model.encode(jnp.asarray(read)))
    noise = np.asarray(row_draw(batch, KEY, lambda key: jax.random.normal(key, shape), 1))
    latents = mean + np.exp(log_std) * noise
    if training:
        kept = row_draw(batch, KEY, lambda key: jax.random.bernoulli(key, 0.85, shape), 2)
        latents = np.where(kept, latents / 0.85, 0)
    logits = model.logits(model.decode(jnp.asarray(latents, jnp.float32)))
    logits = np.asarray(logits, np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    nll = nll.reshape(ROWS, -1, K)
    kl = 0.5 * (mean**2 + np.exp(2 * log_std) - 1 - 2 * log_std)
    counted = np.asarray(batch["segment_ids"])[:, ::K] > 0
    each = nll.sum(-1) + 0.1 * np.maximum(kl, 1e-4).sum(-1)
    assert weight == counted.sum()
    np.testing.assert_allclose(loss, each[counted].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"] / weight, nll[counted].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"] / weight, kl.sum(-1)[counted].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["std"] / weight, np.exp(log_std)[counted].mean(), rtol=1e-5)


def test_the_floor_stops_the_divergence_alone():
    """Below it a dimension has no gradient of its divergence; without dropout all else is CE."""
    model = build_model(CALMAutoencoderConfig.tiny(), jax.random.key(0))
    graphdef, params = nnx.split(model)

    def gradient(**changes):
        config = Reconstruction(token_dropout=0.0, latent_dropout=0.0, **changes)
        loss = lambda p: reconstruction(config, nnx.merge(graphdef, p), _batch(), KEY)[0]  # noqa: E731
        return jax.tree.leaves(jax.grad(loss)(params))

    free = gradient(kl_weight=0.0)
    for found, expected in zip(gradient(kl_weight=1.0, kl_floor=1e3), free, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    clipped = gradient(kl_weight=1.0, kl_floor=0.0)
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(clipped, free, strict=True))


# ------------------------------------------------------------------------------------ next vector


def _targets(model, batch, config):
    """The posterior of the chunk after each, and its draws as the objective makes them."""
    mean, log_std = model.autoencoder.encode(batch["tokens"])
    mean, std = (np.roll(np.asarray(x, np.float64), -1, 1) for x in (mean, jnp.exp(log_std)))
    drawn = []
    for number, start in enumerate(range(0, config.num_targets, 10)):
        shape = (LENGTH // K, min(10, config.num_targets - start), 8)

        def draw(key, number=number, shape=shape):
            return jax.random.normal(jax.random.fold_in(key, number), shape)

        drawn.append(np.asarray(row_draw(batch, KEY, draw, 3)))
    noise = np.concatenate(drawn, axis=2)
    return mean[:, :, None] + std[:, :, None] * noise


def _counted(batch):
    ids = np.asarray(batch["segment_ids"])[:, ::K]
    return (ids > 0) & (np.roll(ids, -1, 1) == ids) & (np.arange(ids.shape[1]) < ids.shape[1] - 1)


@pytest.mark.parametrize(("alpha", "targets"), [(1.0, 25), (1.5, 7), (0.5, 10)])
def test_energy_loss_is_its_definition(alpha, targets):
    """Values and the gradient with respect to the draws, by float64 NumPy, pair by pair."""
    model, batch = _model(), _batch()
    config = NextVector(num_samples=5, num_targets=targets, alpha=alpha)
    loss, weight, metrics = next_vector(config, model, batch, KEY)

    hidden, _ = model(batch["tokens"], segment_ids=batch["segment_ids"])
    draws = LENGTH // K * 5
    noise = row_draw(batch, KEY, lambda key: model.latent_head.noise(key, (draws,)), 1)
    samples = np.asarray(model.draw(hidden, noise), np.float64).reshape(ROWS, -1, 5, 8)
    y = _targets(model, batch, config)

    def score(x, y):
        between = sum(np.linalg.norm(a - b) ** alpha for a in x for b in y) / (len(x) * len(y))
        pairs = itertools.permutations(range(len(x)), 2)
        within = sum(np.linalg.norm(x[i] - x[j]) ** alpha for i, j in pairs)
        return within / (len(x) * (len(x) - 1)) - 2 * between

    counted = _counted(batch)
    assert weight == counted.sum() and 0 < counted.sum() < counted.size
    places = list(zip(*np.nonzero(counted), strict=True))
    expected = -sum(score(samples[p], y[p]) for p in places)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    total = 2 * metrics["distance"] - metrics["spread"]
    np.testing.assert_allclose(total, expected, rtol=1e-5)

    # The gradient through the draws, by adding a bias to each number of the latent in turn.
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    final = params["latent_head"]["final_proj"]

    def of_bias(bias):
        changed = {**params["latent_head"], "final_proj": {**final, "bias": bias}}
        return next_vector(
            config, nnx.merge(graphdef, params | {"latent_head": changed}), batch, KEY
        )[0]

    found = jax.grad(of_bias)(final["bias"])
    step = 1e-5
    for i in range(3):
        moved = np.zeros(8)
        moved[i] = step
        slope = sum(
            score(samples[p] + moved, y[p]) - score(samples[p] - moved, y[p]) for p in places
        ) / (2 * step)
        np.testing.assert_allclose(found[i], -slope, rtol=1e-3, atol=1e-4)


def test_a_fresh_head_has_a_finite_gradient():
    """All its draws coincide, where a distance has none."""
    model = build_model(CALMConfig.tiny(), jax.random.key(0))
    graphdef, params = nnx.split(model)
    config = NextVector(num_samples=3, num_targets=4)

    def loss(params):
        return next_vector(config, nnx.merge(graphdef, params), _batch(), KEY)[0]

    gradient = jax.grad(loss)(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    kernel = gradient["latent_head"]["final_proj"]["kernel"]
    assert np.abs(kernel.get_value()).max() > 0
    autoencoder = jax.tree.leaves(gradient["autoencoder"])
    assert all(np.abs(x).max() == 0 for x in autoencoder)
    distances = jax.grad(lambda x: power_distance(x, 0.5).sum())(jnp.zeros((3, 2)))
    np.testing.assert_array_equal(distances, 0)


def test_the_target_law_scores_best():
    """Draws of the target against shifted, narrower and wider ones, 4000 scores of 4 against 8.

    The least of the differences of means is 12 of its standard errors: no false alarm is seen.
    """
    rng = np.random.default_rng(0)
    target = rng.normal(size=(4000, 8, 3))

    def scores(x):
        between = np.linalg.norm(x[:, :, None] - target[:, None], axis=-1).mean((1, 2))
        within = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1).sum((1, 2)) / 12
        return 2 * between - within

    x = rng.normal(size=(4000, 4, 3))
    best = scores(x)
    for other in (x + 0.3, 0.6 * x, 1.6 * x):
        worse = scores(other) - best
        assert worse.mean() > 5 * worse.std() / np.sqrt(len(worse))


@pytest.mark.parametrize("head", ["diffusion", "flow"])
def test_other_heads_learn_from_draws_of_the_posterior(head):
    model, batch = _model(head), _batch()
    config = NextVector(num_samples=3)
    loss, weight, _ = next_vector(config, model, batch, KEY)
    hidden, _ = model(batch["tokens"], segment_ids=batch["segment_ids"])
    draws = LENGTH // K * 3
    mean, log_std = model.autoencoder.encode(batch["tokens"])
    mean, std = (jnp.repeat(jnp.roll(x, -1, 1), 3, axis=1) for x in (mean, jnp.exp(log_std)))
    targets = mean + std * row_draw(batch, KEY, lambda k: jax.random.normal(k, (draws, 8)), 3)
    drawn = row_draw(batch, KEY, lambda k: model.latent_head.loss_noise(k, (draws,)), 2)
    losses = np.asarray(model.latent_head.loss(hidden, targets, *drawn)).reshape(ROWS, -1, 3)
    np.testing.assert_allclose(loss, losses.mean(-1)[_counted(batch)].sum(), rtol=1e-5)
    assert weight == _counted(batch).sum()


# ----------------------------------------------------------------------------------------- training


def _run(experiment, batch, mesh=None, steps=3):
    graphdef, state = init_state(experiment, mesh)
    before = jax.tree.map(np.asarray, state.params)
    step = make_train_step(experiment, graphdef)
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(experiment, mesh))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, before, state.params


def _experiment(name, **changes):
    base = get_experiment(name)
    data = dataclasses.replace(base.data, batch_size=ROWS, sequence_length=LENGTH)
    model = dataclasses.replace(base.model, **changes)
    return dataclasses.replace(base, data=data, model=model)


_MESH = MeshConfig(data=1, fsdp=2, tensor=2, context=2)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("calm_autoencoder_tiny", {}),
        ("calm_tiny", {}),
        ("calm_tiny", {"head": "diffusion"}),
    ],
    ids=["autoencoder", "energy", "diffusion"],
)
def test_eight_devices_and_microbatches_change_nothing(name, changes):
    experiment, batch = _experiment(name, **changes), _batch()
    alone, before, after = _run(experiment, batch)
    if name == "calm_autoencoder_tiny":
        assert alone[-1] < alone[0]
    else:
        frozen = jax.tree.map(np.array_equal, before["autoencoder"], after["autoencoder"])
        assert all(jax.tree.leaves(frozen))
    parts = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, accumulation=2)
    )
    np.testing.assert_allclose(_run(parts, batch)[0], alone, rtol=1e-4)
    sharded = dataclasses.replace(experiment, mesh=_MESH)
    mesh = make_mesh(sharded.mesh)
    with use_mesh(mesh, sharded.rules):
        np.testing.assert_allclose(_run(sharded, batch, mesh)[0], alone, rtol=1e-4)


def test_two_stages(tmp_path):
    """The second takes the first's autoencoder, leaves it as it is, and saves it with the rest."""
    first, second = tmp_path / "autoencoder", tmp_path / "calm"
    train(get_experiment("calm_autoencoder_tiny"), first)
    settings = [f"model.autoencoder={first}", "train.steps=2", "schedule.warmup_steps=0"]
    settings += ["schedule.decay_steps=0", "train.eval_every=none"]
    experiment = overlay(get_experiment("calm_tiny"), settings)
    assert experiment.parts == (Part("autoencoder", str(first)),)
    result = train(experiment, second)
    assert result.step == 2 and {"distance", "spread", "floor"} <= result.metrics.keys()
    source, saved = load(first), load(second)
    same = jax.tree.map(np.array_equal, source.params, saved.params["autoencoder"])
    assert all(jax.tree.leaves(same))
    # What the run needs is in its own workdir.
    written = json.loads((second / "experiment.json").read_text())
    assert written["parts"] == [{"name": "autoencoder", "source": str(first)}]
    shutil.rmtree(first)
    longer = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=3))
    assert train(longer, second).step == 3

    other = overlay(experiment, ["objective.min_reconstruction=0.9"])
    with pytest.raises(InputError, match=r"model\.autoencoder='.*' does not exist"):
        train(other, tmp_path / "gone")


def test_a_poor_autoencoder_is_refused(tmp_path):
    train(get_experiment("calm_autoencoder_tiny"), tmp_path / "poor")
    settings = [f"model.autoencoder={tmp_path / 'poor'}", "objective.min_reconstruction=0.9"]
    experiment = overlay(get_experiment("calm_tiny"), settings)
    with pytest.raises(InputError, match=r"gives back \d\.\d\d% of the tokens of the first batch"):
        train(experiment, tmp_path / "calm")
    alone = overlay(get_experiment("calm_tiny"), ["objective.min_reconstruction=0.9"])
    with pytest.raises(InputError, match=r"the autoencoder is a random one, and gives back"):
        train(alone, tmp_path / "alone")


def test_parts_that_do_not_fit(tmp_path):
    train(get_experiment("calm_autoencoder_tiny"), tmp_path / "ae")
    part = f"model.autoencoder={tmp_path / 'ae'}"
    with pytest.raises(InputError, match=r"model\.autoencoder\.latent_size=16 is 8 in"):
        changed = overlay(get_experiment("calm_tiny"), [part, "model.autoencoder.latent_size=16"])
        train(changed, tmp_path / "other")
    with pytest.raises(InputError, match="holds a model of LLaDAConfig"):
        train(get_experiment("llada_tiny"), tmp_path / "llada")
        overlay(get_experiment("calm_tiny"), [f"model.autoencoder={tmp_path / 'llada'}"])
    with pytest.raises(InputError, match=r"parts=\['encoder'\]: name each part once"):
        dataclasses.replace(get_experiment("calm_tiny"), parts=(Part("encoder", "x"),))
    with pytest.raises(InputError, match=r"would train autoencoder\."):
        everything = overlay(get_experiment("calm_tiny"), ["optimizer.trainable=.*"])
        init_state(everything)
        make_train_step(everything, init_state(everything)[0])
    with pytest.raises(InputError, match=r"data\.sequence_length=30: must be a multiple"):
        overlay(get_experiment("calm_tiny"), ["data.sequence_length=30", "data.align=1"])
    with pytest.raises(InputError, match="CALMConfig here draws the next chunk's latent"):
        overlay(get_experiment("calm_tiny"), ["objective=next_token"])
    with pytest.raises(InputError, match=r"objective\.alpha=2\.0: must be in \(0, 2\)"):
        NextVector(alpha=2.0)
