"""How a model runs: fields of its configuration, which can be given when it is read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxalope
import jaxalope.layers.ops.latent_decode as latent_decode
from jaxalope.errors import InputError
from jaxalope.model import Model, build_model
from jaxalope.model.kimi_linear import KimiLinear, KimiLinearConfig
from jaxalope.model.kimi_linear_weights import config_to_published
from jaxalope.model.registry import config_from_dict, config_to_dict
from jaxalope.sharding import init_params

FIELDS = ("decode_implementation", "expert_implementation")


@pytest.fixture(scope="module")
def model():
    config = KimiLinearConfig.tiny()
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    return Model(config, graphdef, params)


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


class TestRunningOtherwise:
    """Fields that say how a model runs, given when it is read."""

    @pytest.mark.parametrize("form", ["hf", "orbax"])
    def test_as_it_is_told_by_values_or_by_their_text(self, model, tmp_path, form):
        jaxalope.save(model, tmp_path / "m", form)
        run = {"scan_layers": False, "kda_chunk_size": 32, "expert_implementation": "xla"}
        text = {"scan_layers": "false", "kda_chunk_size": "32", "expert_implementation": "xla"}
        for ways in (run, text):
            apart = jaxalope.load(tmp_path / "m", run=ways)
            assert {name: getattr(apart.config, name) for name in run} == run
            jax.tree.map(np.testing.assert_array_equal, apart.params, model.unrolled().params)
        named = jaxalope.load(tmp_path / "m", run={"decode_implementation": "reference"})
        assert named.config.scan_layers and named.config.decode_implementation == "reference"
        tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 7
        logits = [m(tokens)[0] for m in (apart, named)]
        np.testing.assert_allclose(*logits, atol=1e-5)

    def test_layers_that_are_stored_apart_stay_so(self, model, tmp_path):
        jaxalope.save(model.unrolled(), tmp_path / "apart", "orbax")
        with pytest.raises(InputError, match=r"scan_layers=True: .* leave it out"):
            jaxalope.load(tmp_path / "apart", run={"scan_layers": True})

    def test_what_the_model_is_cannot_be_changed(self, model, tmp_path):
        jaxalope.save(model, tmp_path / "m")
        for name, value, words in (
            ("rms_norm_eps", 1, "does not say how a kimi_linear model runs; what does: .*remat"),
            ("expert_implementation", "fast", "expert_implementation='fast'"),
            ("scan_layers", "no", "cannot be used; scan_layers wants"),
            ("kda_chunk_size", True, "cannot be used; kda_chunk_size wants"),
        ):
            with pytest.raises(InputError, match=words):
                jaxalope.load(tmp_path / "m", run={name: value})
