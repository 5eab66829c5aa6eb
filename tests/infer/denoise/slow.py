"""The samplers as plain loops over one row, whose canvas is no wider than it must be."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxalope
from jaxalope.model import Model
from jaxalope.model.llada import LLaDA, LLaDAConfig

FIXTURE = pathlib.Path(__file__).parents[2] / "fixtures" / "llada_tiny"
MASK = 90


def golden_model() -> Model:
    return jaxalope.load(str(FIXTURE))


def random_model(**changes) -> Model:
    """A model of block diffusion, or of what else is changed, with sharp random weights."""
    config = LLaDAConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 48,
            "mask_token_id": MASK,
            "eos_token_id": 91,
            "initializer_range": 0.4,
            **changes,
        }
    )
    graphdef, state = nnx.split(LLaDA(config, rngs=nnx.Rngs(0)))
    return Model(config, graphdef, nnx.to_pure_dict(state))


def quotas(masked: int, steps: int) -> list[int]:
    return [masked // steps + (i < masked % steps) for i in range(steps)]


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def best(logits) -> tuple[np.ndarray, np.ndarray]:
    """Each position's likeliest token but the mask and its probability, in float64."""
    p = softmax(np.asarray(logits, np.float64))
    p[..., MASK] = 0
    return p.argmax(axis=-1), p.max(axis=-1)


def fill(model, prompt, gen_length, block_length, steps, cfg=0.0):
    """LLaDA's sampler, greedy, with low-confidence remasking; masks of a prompt come first."""
    x = np.concatenate([prompt, np.full(gen_length, MASK)])[None]
    given = x != MASK
    todo = np.flatnonzero(x[0] == MASK)
    for first in range(0, len(todo), block_length):
        block = todo[first : first + block_length]
        for quota in quotas(len(block), steps):
            logits = np.asarray(model(jnp.asarray(x))[0], np.float64)
            if cfg:
                free = np.where(given, MASK, x)
                free = np.asarray(model(jnp.asarray(free))[0], np.float64)
                logits = free + (cfg + 1) * (logits - free)
            token, sure = best(logits[0])
            left = [i for i in block if x[0, i] == MASK]
            for i in sorted(left, key=lambda i: (-sure[i], i))[:quota]:
                x[0, i] = token[i]
    return x[0]


def fill_cached(model, prompt, gen_length, block_length, threshold, cache="prefix"):
    """Fast-dLLM with its prefix or dual cache and a threshold; also the number of calls.

    With shifted logits the place before the block is computed too, which predicts its first token.
    """
    x = np.concatenate([prompt, np.full(gen_length, MASK)])[None]
    length, calls, shift = x.shape[1], 0, int(model.config.logit_shift)
    module = model.module()
    read = jax.jit(lambda tokens, cache, at: module(tokens, cache, positions=at))
    for first in range(len(prompt), length, block_length):
        known = model.init_cache(1, length)
        here = np.arange(first, first + block_length)
        start, stop = 0, length
        while np.any(x[0, here] == MASK):
            at = jnp.arange(start, stop)[None]
            logits, known = read(jnp.asarray(x[:, start:stop]), known, at)
            calls += 1
            token, sure = best(logits[0])
            todo = here[x[0, here] == MASK]
            asked = np.maximum(todo - shift, 0) - start
            chosen = sure[asked] >= min(threshold, sure[asked].max())
            x[0, todo[chosen]] = token[asked[chosen]]
            start = max(first - shift, 0)
            stop = first + block_length if cache == "dual" else length
    return x[0], calls
