"""Denoising against plain loops, and its equivalences: batched, cached, sharded."""

import dataclasses

import jax
import numpy as np
import pytest
from slow import MASK, fill, fill_cached, golden_model, random_model

from jaxalope import Chain, Factor, Temperature, Threshold, TopK, TopQuota, denoise
from jaxalope.infer.programs import _PROGRAMS
from jaxalope.model import Model
from jaxalope.sharding import MeshConfig, make_mesh, param_axes, shardings

pytestmark = pytest.mark.long

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 90, n).tolist() for n in (9, 3, 14, 1)]
SAMPLED = Chain(Temperature(0.7), TopK(20))


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def block_model():
    return random_model(block_size=4)


@pytest.fixture(scope="module")
def shifted():
    return random_model(logit_shift=True, num_layers=3)


def canvases(result):
    return [h.tokens.tolist() for h in result.history]


@pytest.mark.parametrize(
    ("gen_length", "block_length", "steps", "cfg"), [(18, 9, 6, 0.0), (16, 8, 16, 1.0)]
)
def test_low_confidence_remasking_equals_the_plain_loop(
    model, gen_length, block_length, steps, cfg
):
    got = denoise(
        model,
        PROMPTS[:2],
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        cfg_scale=cfg,
        stop_tokens=(),
    )
    for prompt, canvas, nfe in zip(PROMPTS, canvases(got), got.nfe, strict=False):
        per_block = steps // (gen_length // block_length)
        want = fill(model, np.array(prompt), gen_length, block_length, per_block, cfg)
        assert canvas == want.tolist()
        assert nfe == steps


@pytest.mark.parametrize("cfg", [0.0, 0.7])
def test_masks_of_a_prompt_are_filled_in(model, cfg):
    """Rows with different numbers of masks have quotas of their own, and keep what is given."""
    prompts = [[5, MASK, 7, MASK, MASK, 9], [MASK, 3, 4], [1, 2]]
    got = denoise(
        model, prompts, gen_length=8, block_length=4, steps=4, cfg_scale=cfg, stop_tokens=()
    )
    for prompt, canvas in zip(prompts, canvases(got), strict=True):
        assert canvas == fill(model, np.array(prompt), 8, 4, 2, cfg).tolist()
    alone = denoise(model, prompts[:2], gen_length=0, steps=2, cfg_scale=cfg, stop_tokens=())
    for prompt, canvas in zip(prompts, canvases(alone), strict=False):
        assert canvas == fill(model, np.array(prompt), 0, 3, 2, cfg).tolist()
    assert [len(t) for t in alone.tokens] == [0, 0]


@pytest.mark.parametrize(
    ("cache", "rule"),
    [
        ("none", Threshold(0.15)),
        ("none", TopQuota()),
        ("prefix", Factor(1.6)),
        ("dual", Threshold(0.15)),
        ("dual", TopQuota()),
    ],
)
def test_a_batch_of_unequal_prompts_equals_each_alone(model, cache, rule):
    settings = {
        "gen_length": 12,
        "block_length": 4,
        "cache": cache,
        "rule": rule,
        "policy": SAMPLED,
        "confidence_eos_eot_inf": True,
    }
    got = denoise(model, PROMPTS, seed=7, **settings)
    for i, prompt in enumerate(PROMPTS):
        alone = denoise(model, [prompt], seed=7 + i, **settings)
        assert alone.tokens[0].tolist() == got.tokens[i].tolist()
        assert alone.nfe == [got.nfe[i]]
        assert alone.history[0].step.tolist() == got.history[i].step.tolist()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_caches_are_the_published_ones(model, shifted, cache, shift):
    chosen, prompts = (shifted, [*PROMPTS, []]) if shift else (model, PROMPTS)
    got = denoise(
        chosen,
        prompts,
        gen_length=16,
        block_length=4,
        rule=Threshold(0.15),
        cache=cache,
        stop_tokens=(),
    )
    for prompt, canvas, nfe in zip(prompts, canvases(got), got.nfe, strict=True):
        want, calls = fill_cached(chosen, np.array(prompt, int), 16, 4, 0.15, cache)
        assert canvas == want.tolist()
        assert nfe == calls
    plain = denoise(
        chosen, prompts, gen_length=16, block_length=4, rule=Threshold(0.15), stop_tokens=()
    )
    assert canvases(plain) != canvases(got)  # or a cache would not be needed to get the above


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_the_first_call_of_one_block_is_that_without_a_cache(model, shifted, cache, shift):
    model = shifted if shift else model
    settings = {"gen_length": 12, "rule": Threshold(0.12), "stop_tokens": ()}
    plain = denoise(model, PROMPTS, **settings)
    cached = denoise(model, PROMPTS, cache=cache, **settings)
    for a, b in zip(plain.history, cached.history, strict=True):
        np.testing.assert_array_equal(a.step == 1, b.step == 1)
        np.testing.assert_array_equal(a.canvas(1), b.canvas(1))
        np.testing.assert_allclose(
            np.where(a.step == 1, a.confidence, 0),
            np.where(b.step == 1, b.confidence, 0),
            atol=1e-5,
        )
    # One call commits everything: then the whole result is the same.
    once = [denoise(model, PROMPTS, gen_length=12, steps=1, cache=c) for c in ("none", cache)]
    assert canvases(once[0]) == canvases(once[1])
    assert once[1].nfe == [1] * 4


@pytest.mark.parametrize("cache", ["prefix", "dual", "elastic"])
def test_shifted_rows_with_masks_between_equal_each_alone(shifted, cache):
    """The places before a prompt's masks are computed too, as many as there are."""
    prompts = [*PROMPTS[:2], [5, MASK, 6, 7, MASK, MASK, 8, MASK], [MASK, 3]]
    settings = {"gen_length": 12, "cache": cache, "rule": Threshold(0.15), "policy": SAMPLED}
    if cache != "elastic":
        settings["block_length"] = 4
    got = denoise(shifted, prompts, seed=7, **settings)
    for i, prompt in enumerate(prompts):
        alone = denoise(shifted, [prompt], seed=7 + i, **settings)
        assert canvases(alone) == [canvases(got)[i]]
        assert alone.nfe == [got.nfe[i]]


@pytest.mark.parametrize("rule", [Threshold(0.3), TopQuota()])
@pytest.mark.parametrize("shift", [False, True])
def test_the_block_cache_is_exact(shift, rule):
    """A block that is stored costs one call more than where everything is computed again."""
    block_model = random_model(block_size=4, logit_shift=shift)
    prompts = [*PROMPTS, [5, MASK, 6, 7, 8, 9, MASK], []]
    settings = {"gen_length": 10, "rule": rule, "policy": SAMPLED, "stop_tokens": ()}
    plain = denoise(block_model, prompts, cache="none", **settings)
    cached = denoise(block_model, prompts, cache="block", **settings)
    assert canvases(plain) == canvases(cached)
    for prompt, a, b in zip(prompts, plain.nfe, cached.nfe, strict=True):
        length = len(prompt) + 10
        first = prompt.index(MASK) if MASK in prompt else len(prompt)
        blocks = -(-length // 4) - first // 4
        assert b == a + blocks - 1
    for i, prompt in enumerate(prompts):
        alone = denoise(block_model, [prompt], seed=i, cache="block", **settings)
        assert canvases(alone) == [canvases(cached)[i]]


def on_eight_devices(model: Model) -> Model:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params, axes = model.params, param_axes(model.module())
    placed = jax.device_put(params, shardings(params, axes, mesh, model.rules))
    return dataclasses.replace(model, mesh=mesh, params=placed)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "block", "shifted prefix"])
def test_eight_devices_fill_in_what_one_does(model, block_model, shifted, cache):
    chosen = {"block": block_model, "shifted prefix": shifted}.get(cache, model)
    cache = cache.removeprefix("shifted ")
    guided = {"cfg_scale": 0.5} if cache in ("none", "dual") else {}
    settings = {"gen_length": 8, "cache": cache, "policy": SAMPLED, "rule": Threshold(0.2)}
    if cache != "block":
        settings["block_length"] = 4
    one = denoise(chosen, PROMPTS[:3], **settings, **guided)
    eight = denoise(on_eight_devices(chosen), PROMPTS[:3], **settings, **guided)
    assert canvases(one) == canvases(eight)
    assert one.nfe == eight.nfe


def test_one_compilation_serves_every_number(model):
    own = dataclasses.replace(model)
    for threshold, temperature, prompts in ((0.2, 0.5, PROMPTS), (0.9, 1.0, PROMPTS[::-1])):
        denoise(
            own,
            prompts,
            gen_length=8,
            block_length=4,
            rule=Threshold(threshold),
            policy=Temperature(temperature),
            cache="dual",
            stop_tokens=(3,),
        )
    (decoder,) = _PROGRAMS[own].values()
    assert decoder.begin._cache_size() == 1
    assert decoder.decode._cache_size() == 1


def test_history_plays_the_canvas_back(model):
    got = denoise(model, [PROMPTS[0]], gen_length=8, block_length=4, steps=4, stop_tokens=())
    history = got.history[0]
    assert history.canvas(0).tolist() == PROMPTS[0] + [MASK] * 8
    assert history.canvas(got.nfe[0]).tolist() == history.tokens.tolist()
    masks = [int((history.canvas(i) == MASK).sum()) for i in range(5)]
    assert masks == [8, 6, 4, 2, 0]
    given = history.step == 0
    assert given.tolist() == [True] * 9 + [False] * 8
    assert np.all((history.confidence > 0) == ~given)
