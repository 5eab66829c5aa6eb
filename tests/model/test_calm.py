"""CALM and its autoencoder: what depends on what, caches, counts, configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.errors import InputError
from jaxalope.layers.stack import unroll
from jaxalope.model import CALMAutoencoderConfig, CALMConfig, build_model
from jaxalope.model.registry import config_from_dict, config_to_dict

K = 4


@pytest.fixture(scope="module")
def model():
    return build_model(CALMConfig.tiny(), jax.random.key(0))


@pytest.fixture(scope="module")
def autoencoder():
    return build_model(CALMAutoencoderConfig.tiny(), jax.random.key(1))


def _tokens(rows=2, length=24, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 320, (rows, length)), jnp.int32)


class TestAutoencoder:
    def test_chunks_do_not_see_each_other(self, autoencoder):
        tokens = _tokens()
        other = tokens.at[:, 9].add(1)
        before, after = autoencoder(tokens), autoencoder(other)
        changed = np.abs(np.asarray(before - after)).max(axis=(0, 2)) > 0
        np.testing.assert_array_equal(changed, [i // K == 2 for i in range(24)])

    def test_order_within_a_chunk_matters(self, autoencoder):
        tokens = _tokens(1, 4)
        mean, turned = (autoencoder.encode(t)[0] for t in (tokens, tokens[:, ::-1]))
        assert np.abs(np.asarray(mean - turned)).max() > 1e-4

    def test_a_key_draws_the_latent(self, autoencoder):
        tokens = _tokens()
        sharp = autoencoder(tokens)
        drawn = [autoencoder(tokens, jax.random.key(i)) for i in range(2)]
        assert not np.allclose(drawn[0], drawn[1]) and not np.allclose(sharp, drawn[0])

    def test_tokens_are_the_likeliest(self, autoencoder):
        latents = jax.random.normal(jax.random.key(2), (2, 6, 8))
        logits = autoencoder.logits(autoencoder.decode(latents))
        expected = np.argmax(np.asarray(logits), -1).reshape(2, 6, K)
        np.testing.assert_array_equal(autoencoder.tokens(latents), expected)

    def test_rows_are_whole_chunks(self, autoencoder):
        with pytest.raises(InputError, match="23 tokens a row are no whole chunks of 4"):
            autoencoder(_tokens(length=23))


class TestCALM:
    def test_causal(self, model):
        tokens = _tokens()
        other = tokens.at[:, 13].add(1)
        before, after = model(tokens)[0], model(other)[0]
        changed = np.abs(np.asarray(before - after)).max(axis=(0, 2)) > 1e-6
        np.testing.assert_array_equal(changed, [False] * 3 + [True] * 3)

    def test_decode_is_forward(self, model):
        tokens = _tokens()
        whole, _ = model(tokens)
        cache, parts = model.init_cache(2, 6), []
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            hidden, cache = model(tokens[:, start * K : stop * K], cache)
            parts.append(hidden)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
        np.testing.assert_array_equal(cache.length, [6, 6])

    def test_ragged_rows_of_chunks(self, model):
        """Chunks of padding are neither seen nor counted."""
        tokens = _tokens()
        segments = jnp.asarray([[1] * 12 + [0] * 12, [1] * 24])
        hidden, cache = model(tokens, model.init_cache(2, 8), segment_ids=segments)
        np.testing.assert_array_equal(cache.length, [3, 6])
        np.testing.assert_allclose(hidden[0, :3], model(tokens[:1, :12])[0][0], atol=1e-5)
        following = _tokens(2, K, seed=1)
        hidden, _ = model(following, cache)
        alone = jnp.concatenate([tokens[:1, :12], following[:1]], axis=1)
        np.testing.assert_allclose(hidden[0, 0], model(alone)[0][0, -1], atol=1e-5)

    def test_packed_is_alone(self, model):
        tokens = _tokens(1)
        segments = jnp.asarray([[1] * 8 + [2] * 16])
        packed, _ = model(tokens, segment_ids=segments)
        for start, stop in ((0, 2), (2, 6)):
            alone, _ = model(tokens[:, start * K : stop * K])
            np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-5)

    def test_scan_is_unrolled(self, model):
        tokens = _tokens()
        expected, _ = model(tokens)
        found, _ = unroll(nnx.clone(model))(tokens)
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_draws_stand_beside_each_other(self):
        """Draw 2 of activation 1, of three each, is what it is alone."""
        config = CALMConfig.tiny()
        for head in ("energy", "flow", "diffusion"):
            steps = None if head == "energy" else 3
            model = build_model(
                dataclasses.replace(config, head=head, head_steps=steps), jax.random.key(3)
            )
            shake(model.latent_head)
            hidden = jax.random.normal(jax.random.key(4), (2, 4, 32))
            noise = model.latent_head.noise(jax.random.key(5), (2, 12))
            drawn = model.draw(hidden, noise)
            assert drawn.shape == (2, 12, 8) and drawn.dtype == jnp.float32
            alone = model.draw(hidden[:, 1:2], noise[:, 5:6])
            np.testing.assert_allclose(drawn[:, 5:6], alone, atol=1e-5)
            assert np.abs(np.asarray(drawn[:, 4] - drawn[:, 5])).max() > 1e-3

    def test_a_fresh_energy_head_draws_nothing(self, model):
        hidden, _ = model(_tokens())
        noise = model.latent_head.noise(jax.random.key(0), (2, 6))
        assert noise.min() >= -0.5 and noise.max() < 0.5
        np.testing.assert_array_equal(model.draw(hidden, noise), np.zeros((2, 6, 8)))

    def test_there_are_no_logits(self, model):
        with pytest.raises(InputError, match="has no logits"):
            model.logits(jnp.zeros((1, 1, 32)))

    def test_bfloat16(self):
        config = dataclasses.replace(
            CALMConfig.tiny(),
            dtype="bfloat16",
            autoencoder=dataclasses.replace(CALMAutoencoderConfig.tiny(), dtype="bfloat16"),
        )
        model = build_model(config, jax.random.key(0))
        hidden, _ = model(_tokens())
        noise = model.latent_head.noise(jax.random.key(0), (2, 6))
        assert hidden.dtype == jnp.bfloat16 and model.draw(hidden, noise).dtype == jnp.float32
        assert model.autoencoder.encode(_tokens())[0].dtype == jnp.float32


def shake(module):
    """Random numbers in the place of all parameters, so that nothing starts at zero."""
    state = nnx.state(module)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    leaves = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(module, jax.tree.unflatten(structure, leaves))


@pytest.mark.parametrize("head", ["energy", "diffusion", "flow"])
@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_counts(preset, head):
    config = dataclasses.replace(getattr(CALMConfig, preset)(), head=head)
    for c in (config, config.autoencoder):
        shapes = nnx.eval_shape(lambda c=c: build_model(c, jax.random.key(0)))
        count = sum(x.size for x in jax.tree.leaves(nnx.state(shapes)))
        assert c.num_params() == count


def test_published_counts():
    """The numbers of the paper, which leave the autoencoder out; its FLOPs within some percent."""
    millions = {"small": 201.3, "medium": 371.7, "large": 735.3, "xlarge": 1829.8}
    for name, expected in millions.items():
        config = getattr(CALMConfig, name)()
        own = config.num_params() - config.autoencoder.num_params()
        assert own / 1e6 == pytest.approx(expected, abs=0.06)
    assert CALMAutoencoderConfig.released().num_params() / 1e6 == pytest.approx(75.83, abs=0.01)
    for name, inference, training in (
        ("medium", 2.9, 3.7),
        ("large", 4.6, 7.7),
        ("xlarge", 9.4, 19.5),
    ):
        config = getattr(CALMConfig, name)()
        assert config.generation_flops_per_token(8192) / 1e8 == pytest.approx(inference, rel=0.08)
        assert config.flops_per_token(8192) * 5e11 / 1e20 == pytest.approx(training, rel=0.1)


def test_configurations_are_json():
    for config in (CALMConfig.tiny(), CALMAutoencoderConfig.tiny(), CALMConfig.medium()):
        assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "energetic"}, "model.head='energetic' is not one of"),
        ({"head_steps": 10}, "model.head_steps=10 is of diffusion and flow heads"),
        ({"head": "diffusion", "head_steps": 1}, "model.head_steps=1 is not a number of steps"),
        ({"hidden_size": 30}, "model.hidden_size=30 is not a multiple"),
        ({"noise_size": 0}, "model.noise_size=0 must be at least 1"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CALMConfig.tiny(), **changes)


def test_bad_autoencoders():
    with pytest.raises(InputError, match=r"model\.num_encoder_layers=3 must be even"):
        dataclasses.replace(CALMAutoencoderConfig.tiny(), num_encoder_layers=3)
    with pytest.raises(InputError, match=r"model\.latent_size=0 must be at least 1"):
        dataclasses.replace(CALMAutoencoderConfig.tiny(), latent_size=0)
