"""How MLA's cache is read and experts are multiplied are fields of the configuration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxalope.layers.ops.latent_decode as latent_decode
from jaxalope.errors import InputError
from jaxalope.model.kimi_linear import KimiLinear, KimiLinearConfig
from jaxalope.model.kimi_linear_weights import config_to_published
from jaxalope.model.registry import config_from_dict, config_to_dict

FIELDS = ("decode_implementation", "expert_implementation")


def named(name, field="decode_implementation"):
    return dataclasses.replace(KimiLinearConfig.tiny(), **{field: name})


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


def test_the_experts_run_what_is_named():
    def program(name):
        model = KimiLinear(named(name, "expert_implementation"), rngs=nnx.Rngs(0))
        tokens = jnp.arange(24).reshape(2, 12) % 7
        return jax.jit(lambda t: model(t)[0]).trace(tokens).lower(lowering_platforms=("tpu",))

    assert "ragged_dot" in program(None).as_text()
    assert "ragged_dot" not in program("blocked").as_text()


@pytest.mark.parametrize("field", FIELDS)
def test_unknown_names_are_refused(field):
    with pytest.raises(InputError, match=f"{field}='cuda' is not one of .*pallas_gpu"):
        named("cuda", field)


@pytest.mark.parametrize("field", FIELDS)
def test_configurations_saved_before_are_read(field):
    saved = config_to_dict(named("pallas_gpu", field))
    assert config_from_dict(saved) == named("pallas_gpu", field)
    del saved[field]
    assert config_from_dict(saved) == KimiLinearConfig.tiny()


@pytest.mark.parametrize("field", FIELDS)
def test_published_configurations_do_not_name_it(field):
    assert config_to_published(named("pallas_gpu", field)) == config_to_published(named(None))
