"""`jax_enable_x64`, which other code in a pipeline may need, changes no token of ours."""

import functools

import jax
import numpy as np
import pytest

import jaxalope
from jaxalope import Chain, MinP, Model, Temperature, TopP
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.model import CALMConfig, KimiLinearConfig, LLaDAConfig, build_model
from jaxalope.sharding import init_params

pytestmark = pytest.mark.long

PROMPTS = ["abcdefgh", "wxyz"]
SAMPLED = Chain(Temperature(0.9), TopP(0.9), MinP(0.01))


@functools.cache
def model(config):
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    return Model(config, graphdef, params, load_tokenizer("bytes"))


def speculated(model):
    return jaxalope.generate(model, PROMPTS, SAMPLED, 12, draft=jaxalope.PromptLookup())


def denoised(model):
    return jaxalope.denoise(model, PROMPTS, gen_length=16, block_length=8, steps=8, cache="dual")


RUNS = {
    "kimi_linear": (KimiLinearConfig, lambda m: jaxalope.generate(m, PROMPTS, SAMPLED, 12, n=2)),
    "speculative": (KimiLinearConfig, speculated),
    "power": (KimiLinearConfig, lambda m: jaxalope.power_sample(m, PROMPTS, block=4, t_max=8)),
    "denoise": (LLaDAConfig, denoised),
    "vectors": (
        CALMConfig,
        lambda m: jaxalope.generate(m, PROMPTS, jaxalope.BatchTemperature(0.5, 20), 12),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_tokens_are_the_same(name):
    config, run = RUNS[name]
    plain = run(model(config.tiny()))
    with jax.enable_x64(True):
        wide = run(model(config.tiny()))
    for a, b in zip(plain.tokens, wide.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
