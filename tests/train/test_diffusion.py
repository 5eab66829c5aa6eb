"""Masked and block diffusion: published losses, what is drawn, and that nothing else matters.

Tests of frequencies say how often they would fail if all were right: always less than 1e-6.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxalope
from jaxalope.configs import BlockDiffusion, MaskedDiffusion, Muon
from jaxalope.configs.registry import get_experiment
from jaxalope.errors import InputError
from jaxalope.layers.segments import token_positions
from jaxalope.model import LLaDAConfig, build_model
from jaxalope.model.published import published_tensors
from jaxalope.sharding import MeshConfig, make_mesh, split, use_mesh
from jaxalope.train.diffusion import diffusion
from jaxalope.train.noise import add_noise, cart_weights, document_sum, mask_probability
from jaxalope.train.objectives import make_draw, make_objective
from jaxalope.train.step import batch_sharding, init_state, make_eval_step, make_train_step

KEY = jax.random.key(0)
TINY = LLaDAConfig.tiny()
MASK = TINY.mask_token_id
# z of 5 for both tails: a wrong alarm in 1.7 million.
Z = 5.0


def model_of(**changes):
    return build_model(dataclasses.replace(TINY, **changes), KEY)


def tokens_of(rows=4, length=12, seed=0):
    ids = np.random.default_rng(seed).integers(0, 256, (rows, length))
    return {"tokens": jnp.asarray(ids, jnp.int32)}


def noised(config, model, batch, key=KEY):
    return jax.jit(lambda batch, key: add_noise(config, model, batch, key))(batch, key)


# -------------------------------------------------------------------------------- published losses


@pytest.fixture(scope="module")
def golden(fixtures):
    folder = fixtures / "llada_tiny"
    return jaxalope.load(folder), dict(np.load(folder / "loss.npz"))


def given(golden, p):
    """A batch whose noise is the golden one's, each masked token weighted by ``1 / p``."""
    ids, noisy = (jnp.asarray(golden[n], jnp.int32) for n in ("ids", "noisy"))
    masked = noisy == 90
    return {
        "tokens": ids,
        "noisy": noisy,
        "masked": masked,
        "weights": masked / p,
        "counts": jnp.ones(ids.shape),
    }


def test_loss_and_gradients_are_the_published_ones(golden):
    model, numbers = golden

    def loss(params):
        module = nnx.merge(model.graphdef, params)
        total, count, _ = diffusion(
            MaskedDiffusion(), module, given(numbers, numbers["p_mask"]), KEY
        )
        return total / count

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(value, numbers["loss_pretrain"], rtol=1e-4)
    theirs = published_tensors(dataclasses.replace(model, params=grads))
    names = [n.removeprefix("grad_pretrain_") for n in numbers if n.startswith("grad_pretrain_")]
    assert len(names) == 3
    for name in names:
        expected = numbers[f"grad_pretrain_{name}"]
        # The weights are sharp: float32 gradients of two compilers differ by half of this.
        np.testing.assert_allclose(theirs[name], expected, atol=1e-4, rtol=0)
        error = np.linalg.norm(theirs[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, (name, error)


def test_the_loss_with_an_exact_ratio_is_the_published_one(golden):
    model, numbers = golden
    masked = numbers["noisy"] == 90
    p = np.maximum(masked.sum(1, keepdims=True), 1) / masked.shape[1]
    total, count, _ = diffusion(MaskedDiffusion(), model.module(), given(numbers, p), KEY)
    np.testing.assert_allclose(total / count, numbers["loss_exact_ratio"], rtol=1e-4)


def test_published_draws_make_the_published_noise(golden, monkeypatch):
    """From the golden's uniform numbers: where masks stand, and what each counts."""
    _, numbers = golden
    monkeypatch.setattr("jaxalope.train.noise._levels", lambda *_: jnp.asarray(numbers["t"]))
    monkeypatch.setattr(jax.random, "uniform", lambda *_, **__: jnp.asarray(numbers["u"]))
    model = model_of(vocab_size=96, mask_token_id=90, eos_token_id=None, pad_token_id=None)
    config = MaskedDiffusion(random_length=0.0)
    batch = add_noise(config, model, {"tokens": jnp.asarray(numbers["ids"], jnp.int32)}, KEY)
    np.testing.assert_array_equal(batch["noisy"], numbers["noisy"])
    expected = given(numbers, numbers["p_mask"])
    np.testing.assert_allclose(batch["weights"], expected["weights"], rtol=1e-5)
    np.testing.assert_array_equal(batch["counts"], 1)
    exact = add_noise(
        dataclasses.replace(config, exact_ratio=True),
        model,
        {"tokens": jnp.asarray(numbers["ids"], jnp.int32)},
        KEY,
    )
    assert (exact["masked"].sum(1) >= 1).all()


# ------------------------------------------------------------------------------- what is drawn


def test_each_stratum_has_one_level_and_each_mask_its_probability():
    """Strata are exact; the masks of a stratum are counted against its level, z below 5."""
    config, model = MaskedDiffusion(random_length=0.0), model_of()
    rows, length = 64, 2000
    batch = noised(config, model, tokens_of(rows, length))
    # The weight of any masked token says its row's p, and p says t.
    p = 1 / np.max(batch["weights"], axis=1)
    t = (p - 1e-3) / (1 - 1e-3)
    assert sorted(np.floor(t * rows - 1e-4).clip(0)) == list(range(rows))
    assert np.any(np.argsort(t) != np.arange(rows))
    z = (np.asarray(batch["masked"]).sum(1) - length * p) / np.sqrt(length * p * (1 - p) + 1e-9)
    assert np.abs(z).max() < Z + 1  # The largest of 64: 6 makes a wrong alarm in 8 million.
    np.testing.assert_array_equal(batch["noisy"], np.where(batch["masked"], MASK, batch["tokens"]))


def test_levels_lie_in_the_band_and_are_uniform_without_strata():
    """The mean of 4096 levels of a band of 0.4, z below 5."""
    config = MaskedDiffusion(band=(0.3, 0.7), stratified=False, random_length=0.0, eps=0.0)
    batch = noised(config, model_of(), tokens_of(4096, 64))
    masked = np.asarray(batch["masked"]).any(1)
    p = 1 / np.max(batch["weights"], axis=1)[masked]
    assert 0.3 <= p.min() < 0.31 and 0.69 < p.max() <= 0.7 + 1e-6
    assert abs(p.mean() - 0.5) < Z * 0.4 / math.sqrt(12 * len(p))


@pytest.mark.parametrize("schedule", ["linear", "poly2", "cosine"])
def test_schedules_are_of_one_bound(schedule):
    """``w`` is ``-α'/(1 - α)``, and integrals of ``w(t) f(p(t))`` are those of ``f(p) / p``."""
    config = MaskedDiffusion(schedule=schedule, eps=0.0)
    t = (np.arange(20000) + 0.5) / 20000
    p, slope = mask_probability(config, jnp.asarray(t))
    alpha, weight = {
        "linear": (1 - t, 1 / t),
        "poly2": (1 - t**2, 2 / t),
        "cosine": (
            1 - np.cos(np.pi / 2 * (1 - t)),
            np.pi / 2 * np.tan(np.pi / 2 * (1 - t)),
        ),
    }[schedule]
    np.testing.assert_allclose(p, 1 - alpha, atol=1e-6)
    np.testing.assert_allclose(slope / p, weight, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.mean(slope / p * p**2 * (2 - p)), 1 - 1 / 3, rtol=1e-3)


def test_an_exact_ratio_is_that_of_the_row_and_no_row_is_without_a_mask():
    config = MaskedDiffusion(exact_ratio=True, random_length=0.0, band=(0.0, 0.2))
    batch = tokens_of(64, 10)
    batch["loss_weights"] = jnp.ones((64, 10)).at[:, :4].set(0).at[5].set(0)
    out = noised(config, model_of(), batch)
    count = np.asarray(out["masked"]).sum(1)
    assert count[5] == 0 and (np.delete(count, 5) >= 1).all() and (count == 1).sum() > 20
    assert not out["masked"][:, :4].any()
    expected = np.where(out["masked"], 6 / np.maximum(count, 1)[:, None], 0)
    np.testing.assert_allclose(out["weights"], expected, rtol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_complements_cover_every_token_once(exact):
    config = MaskedDiffusion(complementary=True, exact_ratio=exact, random_length=0.0)
    batch = tokens_of(16, 40)
    batch["segment_ids"] = jnp.ones((16, 40), jnp.int32).at[:, 30:].set(0)
    out = noised(config, model_of(), batch)
    assert out["tokens"].shape == (32, 40)
    np.testing.assert_array_equal(out["tokens"][0::2], out["tokens"][1::2])
    first, second = (np.asarray(out["masked"][i::2]) for i in (0, 1))
    np.testing.assert_array_equal(first ^ second, np.asarray(batch["segment_ids"]) > 0)
    assert not (first & second).any() and first.any() and second.any()
    # Their probabilities add up to one, but for eps at the ends.
    w = [np.max(out["weights"][i::2], axis=1) for i in (0, 1)]
    both = (w[0] > 0) & (w[1] > 0)
    np.testing.assert_allclose(1 / w[0][both] + 1 / w[1][both], 1, atol=2e-3)


def test_a_step_in_some_is_cut_to_one_random_length():
    """A third of 3000 steps; lengths uniform in 1..12; z below 5 and 6 (the largest of 12)."""
    config, model, batch = MaskedDiffusion(random_length=1 / 3), model_of(), tokens_of(2, 12)

    @jax.jit
    def lengths(keys):
        def one(key):
            return (add_noise(config, model, batch, key)["segment_ids"] > 0).sum(1)

        return jax.vmap(one)(keys)

    found = np.asarray(lengths(jax.random.split(KEY, 3000)))
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    count = np.bincount(found[:, 0], minlength=13)
    p = np.full(13, 1 / 36)
    p[0], p[12] = 0, 2 / 3 + 1 / 36
    assert count[0] == 0
    z = (count - 3000 * p)[1:] / np.sqrt(3000 * p * (1 - p))[1:]
    assert np.abs(z).max() < Z + 1


def test_prompts_padding_and_first_tokens_of_shifted_models_are_never_masked():
    batch = tokens_of(64, 12)
    batch["segment_ids"] = jnp.tile(jnp.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]), (64, 1))
    batch["loss_weights"] = jnp.ones((64, 12)).at[:, 2].set(0).at[:, 8].set(0.5)
    for shift, never in ((False, [0, 2, 10, 11]), (True, [0, 1, 2, 6, 10, 11])):
        out = noised(
            MaskedDiffusion(random_length=0, band=(0.5, 1.0)), model_of(logit_shift=shift), batch
        )
        assert np.flatnonzero(~np.asarray(out["masked"]).any(0)).tolist() == never
        counts = np.ones(12)
        counts[never], counts[8] = 0, 0.5
        np.testing.assert_allclose(out["counts"], np.tile(counts, (64, 1)))
        w = np.asarray(out["weights"])
        assert (w[:, never] == 0).all()
        both = (w[:, 8] > 0) & (w[:, 9] > 0)
        np.testing.assert_allclose(w[both, 8], w[both, 9] / 2, rtol=1e-5)


def test_padding_ends_a_text_with_tokens_that_are_learnt():
    """And each text counts the same, whatever its length (the published fine-tuning loss)."""
    batch = tokens_of(2, 8)
    batch["segment_ids"] = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8])
    batch["loss_weights"] = jnp.array([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    batch["positions"] = jnp.zeros((2, 8), jnp.int32)
    config = MaskedDiffusion(
        eos_padding=True, normalization="sequence", random_length=0, stratified=False
    )
    model = model_of()
    out = noised(config, model, batch)
    np.testing.assert_array_equal(out["tokens"][0, 5:], [TINY.eos_token_id] * 3)
    np.testing.assert_array_equal(out["tokens"][1], batch["tokens"][1])
    np.testing.assert_array_equal(out["segment_ids"], np.ones((2, 8)))
    assert "positions" not in out
    np.testing.assert_allclose(out["counts"].sum(1), [1, 1], rtol=1e-6)
    # (1/B) sum over rows of (1/A) sum over masked of CE / p.
    plain = noised(dataclasses.replace(config, normalization="token"), model, batch)
    np.testing.assert_array_equal(plain["masked"], out["masked"])
    np.testing.assert_array_equal(plain["counts"].sum(1), [6, 4])
    np.testing.assert_allclose(out["weights"], plain["weights"] / np.array([[6], [4]]), rtol=1e-6)
    logits = model(out["noisy"])[0]
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), out["tokens"][..., None], -1)[..., 0]
    expected = np.mean(np.sum(ce * plain["weights"], 1) / np.array([6, 4]))
    total, count, _ = diffusion(config, model, out, KEY)
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def test_padding_goes_as_far_as_the_longest_row():
    """And in block diffusion to the end of its block."""
    batch = tokens_of(2, 12)
    batch["segment_ids"] = jnp.array([[1] * 3 + [0] * 9, [1] * 6 + [0] * 6])
    for config, end in ((MaskedDiffusion(random_length=0), 6), (BlockDiffusion(), 8)):
        config = dataclasses.replace(config, eos_padding=True)
        out = noised(config, model_of(block_size=4 if end == 8 else None), batch)
        np.testing.assert_array_equal(out["segment_ids"], np.tile(np.arange(12) < end, (2, 1)))
        np.testing.assert_array_equal(out["counts"] > 0, out["segment_ids"] > 0)
        assert (out["tokens"][0, 3:end] == TINY.eos_token_id).all()


def test_document_sums_and_cart_weights_equal_their_loops():
    rng = np.random.default_rng(0)
    segments = np.array(
        [[0, 1, 1, 1, 0, 1, 2, 2, 2, 2, 2, 0], [3, 3, 4, 4, 4, 4, 4, 4, 5, 0, 0, 5]]
    )
    x, visible = rng.uniform(size=(2, 12)), rng.uniform(size=(2, 12)) < 0.5
    x[segments == 0], visible[segments == 0] = 0, False
    sums = document_sum(jnp.asarray(x), jnp.asarray(segments))
    weights = cart_weights(jnp.asarray(visible), jnp.asarray(segments))
    for row, i in np.ndindex(2, 12):
        if segments[row, i] == 0:
            continue
        own = segments[row] == segments[row, i]
        np.testing.assert_allclose(sums[row, i], x[row, own].sum(), rtol=1e-5)
        js = [j for j in np.flatnonzero(own & visible[row]) if j != i]
        expected = sum(0.5 * 0.3 * 0.7 ** (abs(i - j) - 1) for j in js)
        np.testing.assert_allclose(weights[row, i], expected, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "cart"])
def test_other_weights_replace_the_bounds(weighting):
    config = MaskedDiffusion(weighting=weighting, random_length=0)
    out = noised(config, model_of(), tokens_of())
    masked = np.asarray(out["masked"])
    expected = masked.astype(np.float32)
    if weighting == "cart":
        expected *= np.asarray(cart_weights(jnp.asarray(~masked), jnp.ones((4, 12), jnp.int32)))
    np.testing.assert_allclose(out["weights"], expected, rtol=1e-6)
    np.testing.assert_array_equal(out["counts"], 1)


# ------------------------------------------------------------------------------------ the loss


def test_the_loss_is_an_unbiased_bound(golden):
    """Over all subsets of a text of 5 tokens: the mean over orders of their log-likelihoods.

    With exact ratios the level is a count, and its expectation has a closed form: every count
    weighs the mean over its subsets by ``1 / count``. Twenty thousand draws, z below 5.
    """
    model, numbers = golden
    module, length = model.module(), 5
    ids = jnp.asarray(numbers["ids"][0, :length], jnp.int32)
    subsets = np.array(list(itertools.product([False, True], repeat=length)))[1:]
    logp = jax.nn.log_softmax(module(jnp.where(subsets, 90, ids))[0])
    ce = -np.where(subsets, logp[:, np.arange(length), ids], 0).sum(1)
    size = subsets.sum(1)
    exact = sum(ce[size == k].mean() / k for k in range(1, length + 1))
    config, rows = MaskedDiffusion(random_length=0, eps=0.0), 20000
    batch = noised(config, module, {"tokens": jnp.tile(ids, (rows, 1))})
    which = np.packbits(batch["masked"], axis=1)[:, 0] >> 3
    table = np.concatenate([[0.0], ce])
    w = np.max(batch["weights"], axis=1)
    draws = table[which] * w
    # Strata only lower the deviation of the mean. Its tail is heavy: 1 / p of rare masks is large.
    assert abs(draws.mean() - exact) < Z * draws.std() / math.sqrt(rows)
    assert draws.std() / math.sqrt(rows) < 0.03 * exact


def test_packed_documents_lose_what_they_lose_apart():
    model, batch = model_of(), tokens_of(1, 16)
    batch["segment_ids"] = jnp.array([[1] * 7 + [2] * 6 + [0] * 3])
    out = noised(MaskedDiffusion(random_length=0, band=(0.4, 0.9)), model, batch)
    total, count, metrics = diffusion(MaskedDiffusion(), model, out, KEY)
    parts = []
    for own in (slice(0, 7), slice(7, 13)):
        part = {n: x[:, own] for n, x in out.items() if n != "segment_ids"}
        parts.append(diffusion(MaskedDiffusion(), model, part, KEY))
    np.testing.assert_allclose(total, sum(p[0] for p in parts), rtol=1e-4)
    assert count == 13 and [float(p[1]) for p in parts] == [7, 6]
    assert metrics["masked"] == out["masked"].sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_block_diffusion_is_every_blocks_loss_behind_its_clean_past(packed, shift):
    config, model = BlockDiffusion(band=(0.3, 1.0)), model_of(block_size=4, logit_shift=shift)
    batch = tokens_of(2, 14)
    segments = np.ones((2, 14), np.int32)
    if packed:
        segments[:, 6:] = 2
        segments[0, -1] = 0
    batch["segment_ids"] = jnp.asarray(segments)
    out = noised(config, model, batch)
    total, count, _ = diffusion(config, model, out, KEY)
    expected, documents = 0.0, 0
    for row in range(2):
        for document in set(segments[row]) - {0}:
            own = np.flatnonzero(segments[row] == document)
            documents += 1
            for start in range(0, len(own), 4):
                here = own[start : start + 4]
                w = np.asarray(out["weights"][row, here])
                assert len(set(w[w > 0].tolist())) <= 1  # One level a block.
                text = jnp.concatenate([out["tokens"][row, own[:start]], out["noisy"][row, here]])
                logp = np.asarray(jax.nn.log_softmax(model(text[None])[0][0]))
                at = np.maximum(start + np.arange(len(here)) - shift, 0)
                expected -= np.sum(w * logp[at, out["tokens"][row, here]])
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert count == (segments > 0).sum() - shift * documents
    assert out["masked"][:, 4].any() or out["masked"][:, 8].any()


def test_blocks_have_strata_of_their_own_over_the_whole_batch():
    config, model = BlockDiffusion(eps=0.0), model_of(block_size=500)
    out = noised(config, model, tokens_of(8, 4000))
    p = np.asarray(out["masked"]).reshape(8, 8, 500).mean(-1).ravel()
    w = 1 / np.asarray(out["weights"]).reshape(64, 500).max(-1)
    assert sorted(np.floor(w * 64 - 1e-3).clip(0)) == list(range(64))
    z = (p - w) / np.sqrt(w * (1 - w) / 500 + 1e-9)
    assert np.abs(z).max() < Z + 1
    # Levels of a row's blocks are as far apart as those of any: no row is all noise.
    assert (np.ptp(w.reshape(8, 8), axis=1) > 0.2).all()


def test_shifted_logits_are_of_the_next_token():
    """The same numbers as shifting the logits by hand, first tokens left out."""
    model, batch = model_of(logit_shift=True), tokens_of(2, 10)
    batch["segment_ids"] = jnp.array([[1] * 6 + [2] * 4, [0, 0] + [1] * 8])
    out = noised(MaskedDiffusion(random_length=0, band=(0.5, 0.9)), model, batch)
    total, _, _ = diffusion(MaskedDiffusion(), model, out, KEY)
    logp = jax.nn.log_softmax(model(out["noisy"], segment_ids=out["segment_ids"])[0])
    shifted = jnp.concatenate([logp[:, :1], logp[:, :-1]], axis=1)
    ce = -jnp.take_along_axis(shifted, out["tokens"][..., None], -1)[..., 0]
    np.testing.assert_allclose(total, np.sum(ce * out["weights"]), rtol=1e-5)
    starts = np.asarray(token_positions(batch["segment_ids"])) == 0
    assert (np.asarray(out["weights"])[starts] == 0).all() and total > 0


def test_chunks_of_logits_are_the_whole():
    model, batch = model_of(), tokens_of(4, 12)
    out = noised(MaskedDiffusion(random_length=0), model, batch)
    graphdef, params = split(model)

    def run(limit):
        def loss(params):
            config = MaskedDiffusion(max_logits=limit)
            return diffusion(config, nnx.merge(graphdef, params), out, KEY)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(10**9), run(4000)
    )


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("max_logits", [2**27, 1000])
def test_sharpening_is_the_entropy_where_the_guess_is_right(shift, max_logits):
    model = model_of(logit_shift=shift, initializer_range=0.3)
    batch = tokens_of(4, 12) | {"loss_weights": jnp.ones((4, 12)).at[:, :3].set(0)}
    config = MaskedDiffusion(
        sharpening=0.5, normalization="sequence", random_length=0, max_logits=max_logits
    )
    out = noised(config, model, batch)
    logits = np.asarray(model(out["noisy"])[0], np.float64)
    # Half of the targets are what the model says.
    said = np.roll(logits.argmax(-1), int(shift), axis=1)
    tokens = np.where(np.arange(12) % 2, said, out["tokens"])
    out = out | {"tokens": jnp.asarray(tokens, jnp.int32)}
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = np.roll(-(p * np.log(p)).sum(-1), int(shift), axis=1)
    chosen = np.asarray(out["masked"]) & (said == tokens)
    assert 0 < chosen.sum() < np.sum(out["masked"])
    expected = np.sum(chosen * entropy * np.asarray(out["counts"]))
    plain, weight, _ = diffusion(dataclasses.replace(config, sharpening=0.0), model, out, KEY)
    total, same, metrics = diffusion(config, model, out, KEY)
    assert same == weight and "entropy" in metrics
    np.testing.assert_allclose(metrics["entropy"], expected, rtol=1e-4)
    np.testing.assert_allclose(total - plain, 0.5 * expected, rtol=1e-3)


# ------------------------------------------------------------------------------------ training

RUNS = {
    "masked": (MaskedDiffusion(random_length=0.5, sharpening=0.3), {}),
    "fine-tuning": (
        MaskedDiffusion(
            normalization="sequence",
            eos_padding=True,
            exact_ratio=True,
            complementary=True,
            weighting="cart",
        ),
        {},
    ),
    "blocks": (BlockDiffusion(), {"block_size": 8}),
    "shifted": (MaskedDiffusion(), {"logit_shift": True}),
    "shifted blocks": (BlockDiffusion(eos_padding=True), {"block_size": 8, "logit_shift": True}),
}


def experiment_of(name, **train):
    objective, changes = RUNS[name]
    base = get_experiment("llada_tiny")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **changes),
        objective=objective,
        optimizer=Muon(),
        train=dataclasses.replace(base.train, **train),
        schedule=dataclasses.replace(base.schedule, warmup_steps=0, learning_rate=1e-2),
    )


def text_batch():
    rng = np.random.default_rng(0)
    segments = np.ones((4, 32), np.int32)
    segments[:, 20:] = 2
    segments[0, -3:] = 0
    return {
        "tokens": (rng.integers(0, 2, (4, 32)) + 65).astype(np.int32),
        "segment_ids": segments,
        "positions": np.where(segments == 2, np.arange(32) - 20, np.arange(32)).astype(np.int32),
    }


def losses(experiment, mesh=None, steps=3):
    graphdef, state = init_state(experiment, mesh)
    step, found, batch = make_train_step(experiment, graphdef), [], text_batch()
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(experiment, mesh))
    for _ in range(steps):
        state, metrics = step(state, batch)
        found.append([float(metrics[n]) for n in ("loss", "weight", "grad_norm", "masked")])
    return np.array(found)


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_accumulation_and_devices_change_nothing(name):
    experiment = experiment_of(name)
    alone = losses(experiment)
    np.testing.assert_allclose(losses(experiment_of(name, accumulation=2)), alone, rtol=2e-3)
    mesh = dataclasses.replace(experiment, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    with use_mesh(make_mesh(mesh.mesh), mesh.rules):
        found = losses(mesh, make_mesh(mesh.mesh))
    np.testing.assert_allclose(found, alone, rtol=2e-3)


@pytest.mark.parametrize("name", ["masked", "blocks", "shifted"])
def test_the_loss_falls(name):
    """A text of two letters: from the log of the vocabulary to little more than that of two."""
    experiment = dataclasses.replace(experiment_of(name, steps=40), name="toy")
    graphdef, state = init_state(experiment)
    step, measure = (f(experiment, graphdef) for f in (make_train_step, make_eval_step))

    def held_out(state):
        sums = [measure(state.params, text_batch(), i) for i in range(4)]
        return sum(float(s["loss"]) for s in sums) / sum(float(s["weight"]) for s in sums)

    before = held_out(state)
    assert held_out(state) == before
    one, other = (float(measure(state.params, text_batch(), i)["masked"]) for i in (0, 1))
    assert one != other
    for _ in range(40):
        state, _ = step(state, text_batch())
    assert before > 4 and held_out(state) < 1.5


def test_an_objective_called_by_itself_draws_as_the_step_does():
    model, batch, config = model_of(), tokens_of(), MaskedDiffusion()
    alone = make_objective(config)(model, batch, KEY)
    drawn = make_objective(config)(model, make_draw(config)(model, batch, KEY), KEY)
    np.testing.assert_allclose(alone[0], drawn[0], rtol=1e-6)


# ---------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (MaskedDiffusion, {"weighting": "linear"}, "objective.weighting='linear'"),
        (MaskedDiffusion, {"normalization": "batch"}, "objective.normalization='batch'"),
        (MaskedDiffusion, {"random_length": 1.5}, r"objective.random_length=1\.5"),
        (MaskedDiffusion, {"band": (0.7, 0.3)}, r"objective.band=\(0\.7, 0\.3\)"),
        (BlockDiffusion, {"band": (0.0, 1.1)}, "objective.band="),
        (BlockDiffusion, {"schedule": "sine"}, "objective.schedule='sine'"),
        (BlockDiffusion, {"eps": 1.0}, r"objective.eps=1\.0"),
        (BlockDiffusion, {"max_logits": 0}, "objective.max_logits=0"),
    ],
)
def test_settings_that_cannot_be_are_named(kind, changes, message):
    with pytest.raises(InputError, match=message):
        kind(**changes)


def test_an_objective_fits_its_model():
    base, other = get_experiment("llada_tiny"), get_experiment("gemma2_tiny")
    blocks = dataclasses.replace(base.model, block_size=4)
    for experiment, changes, message in (
        (base, {"objective": other.objective}, "LLaDAConfig here fills in masks"),
        (other, {"objective": MaskedDiffusion()}, "Gemma2Config here predicts the next token"),
        (base, {"objective": BlockDiffusion()}, "model.block_size=None: block_diffusion needs one"),
        (base, {"model": blocks}, "model.block_size=4: block_diffusion needs one"),
        (
            base,
            {
                "objective": MaskedDiffusion(eos_padding=True),
                "model": dataclasses.replace(base.model, eos_token_id=None),
            },
            "model.eos_token_id is None",
        ),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(experiment, **changes)
    # Of the same shape, a model that goes from token to token.
    causal = dataclasses.replace(base.model, block_size=1, logit_shift=True)
    dataclasses.replace(base, model=causal, objective=other.objective)
