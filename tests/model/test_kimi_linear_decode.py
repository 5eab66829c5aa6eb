"""Which implementation reads the cache of MLA is a field of the configuration."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxalope.layers.ops.latent_decode as latent_decode
from jaxalope.errors import InputError
from jaxalope.model.kimi_linear import KimiLinear, KimiLinearConfig
from jaxalope.model.kimi_linear_weights import config_to_published
from jaxalope.model.registry import config_from_dict, config_to_dict


def named(name):
    return dataclasses.replace(KimiLinearConfig.tiny(), decode_implementation=name)


def test_the_kernel_that_is_named_decodes(monkeypatch):
    run = functools.partial(latent_decode._IMPLEMENTATIONS["pallas_tpu"], interpret=True)
    called = []

    def counted(*arrays, **static):
        called.append(True)
        return run(*arrays, **static)

    monkeypatch.setitem(latent_decode._IMPLEMENTATIONS, "pallas_tpu", counted)
    tokens = jnp.arange(24).reshape(2, 12) % 7
    logits = []
    for config in (KimiLinearConfig.tiny(), named("pallas_tpu")):
        model = KimiLinear(config, rngs=nnx.Rngs(0))
        cache = model.init_cache(2, 16)
        parts = []
        for token in range(3):
            out, cache = model(tokens[:, token : token + 1], cache)
            parts.append(out)
        logits.append(jnp.concatenate(parts, axis=1))
    assert called
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="decode_implementation='cuda' is not one of pallas_gpu"):
        named("cuda")


def test_configurations_saved_before_are_read():
    saved = config_to_dict(named("pallas_gpu"))
    assert config_from_dict(saved) == named("pallas_gpu")
    del saved["decode_implementation"]
    assert config_from_dict(saved) == KimiLinearConfig.tiny()


def test_published_configurations_do_not_name_it():
    assert config_to_published(named("pallas_gpu")) == config_to_published(named(None))
