"""What every family's cache keeps to: made of shapes alone, of the dtype that was asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.model import build_model
from jaxalope.model.registry import FAMILIES
from jaxalope.sharding import abstract

CONFIGS = {
    name: family.config.tiny()
    for name, family in FAMILIES.items()
    if hasattr(family.model, "init_cache")
}


def described(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_made_without_parameters(name):
    """An eager slice of every stacked weight was 15 GB of the 48B model's."""
    graphdef, shapes, _ = abstract(lambda key: build_model(CONFIGS[name], key))
    cache = nnx.merge(graphdef, shapes).init_cache(2, 8)
    traced = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(2, 8), shapes)
    assert described(cache) == described(traced)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("model", "cache"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_keeps_its_dtype(name, model, cache, chunks, segments):
    """A loop carries it, and takes nothing back that is of another dtype."""
    config = dataclasses.replace(CONFIGS[name], dtype=model)
    graphdef, shapes, _ = abstract(lambda key: build_model(config, key))
    length = chunks * getattr(config, "chunk_size", 1)
    tokens = jnp.zeros((2, length), jnp.int32)
    segment_ids = jnp.ones((2, length), jnp.int32) if segments else None

    def call(params):
        module = nnx.merge(graphdef, params)
        before = module.init_cache(2, 8, cache)
        return before, module(tokens, before, segment_ids=segment_ids)[1]

    before, after = jax.eval_shape(call, shapes)
    assert described(before) == described(after)
    assert any(leaf.dtype == cache for leaf in jax.tree.leaves(after))
