"""What every plain decoder must keep to, on the tiny models of Gemma-2 and GPT-NeoX.

Each has a scanned group; Gemma-2 an odd block behind it, and windows that all texts here exceed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope import DraftModel, Greedy, InputError, Model, PromptLookup, generate, power_sample
from jaxalope.infer.cache import CacheLayout
from jaxalope.layers.stack import plan, restack, unstack
from jaxalope.model import Gemma2Config, GPTNeoXConfig, build_model
from jaxalope.sharding import AxisRules, MeshConfig, abstract, init_params, make_mesh, use_mesh

CONFIGS = {
    "gemma2": Gemma2Config.tiny(),
    "gpt_neox": GPTNeoXConfig.tiny(),
}
VOCAB = 320


def random_model(config, seed=0, spread=1.0):
    """A model whose weights are large enough for every layer to matter, biases included."""
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        leaf + spread * jax.random.normal(k, leaf.shape) / np.sqrt(leaf.shape[-1])
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return Model(config, graphdef, jax.tree.unflatten(treedef, leaves))


def tokens_of(shape, seed=3):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def packed_segments(rows, length):
    """Two documents a row; padding left in row 0 and right in row 1."""
    segments = np.ones((rows, length), np.int32)
    segments[:, 2 * length // 3 :] = 2
    segments[0, :2] = 0
    segments[1, -3:] = 0
    return segments


def gradients(graphdef, params, ids, segments):
    def loss(params, ids, segments):
        logits = nnx.merge(graphdef, params)(ids, segment_ids=segments)[0]
        return jnp.mean(jnp.where((segments != 0)[..., None], jnp.sin(logits), 0))

    return jax.jit(jax.value_and_grad(loss))(params, ids, segments)


def unrolled_by_hand(model):
    """The same weights, one block after another, by the stack's own list of blocks."""
    config = dataclasses.replace(model.config, scan_layers=False)
    graphdef, _, _ = abstract(lambda key: build_model(config, key))
    blocks = unstack(model.params["stack"], plan(config.kinds))
    stack = restack(blocks, plan(config.kinds, scan=False))
    return Model(config, graphdef, {**model.params, "stack": stack})


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.mark.parametrize("split", [1, 5, 20])
def test_decode_equals_forward(model, split):
    ids = tokens_of((2, 37))
    expected, _ = model(ids)
    cache, rows, at = model.init_cache(2, 40), [], 0
    while at < 37:
        logits, cache = model(ids[:, at : at + split], cache)
        rows.append(logits)
        at += split
    np.testing.assert_allclose(np.concatenate(rows, 1), expected, atol=2e-4)
    assert cache.length.tolist() == [37, 37]


def test_ragged_prefill_equals_each_row_alone(model):
    lengths = [1, 9, 20]
    ids = tokens_of((3, 20))
    valid = (np.arange(20) < np.array(lengths)[:, None]).astype(np.int32)
    logits, cache = model(ids, model.init_cache(3, 32), segment_ids=valid)
    after, _ = model(ids[:, :1], cache)
    for row, length in enumerate(lengths):
        alone, _ = model(np.concatenate([ids[row : row + 1, :length], ids[row : row + 1, :1]], 1))
        np.testing.assert_allclose(logits[row, :length], alone[0, :length], atol=2e-4)
        np.testing.assert_allclose(after[row, 0], alone[0, length], atol=2e-4)
    assert cache.length.tolist() == lengths


def test_packed_and_padded_equal_separate(model):
    ids = tokens_of((3, 30))
    segments = packed_segments(3, 30)
    packed, _ = model(ids, segment_ids=segments)
    assert np.isfinite(packed).all()
    for row in range(3):
        for document in (1, 2):
            own = segments[row] == document
            alone, _ = model(ids[row : row + 1, own])
            np.testing.assert_allclose(packed[row, own], alone[0], atol=2e-4)


def test_scan_equals_unrolled(model):
    assert plan(model.config.kinds).repeats > 1
    ids, other = tokens_of((2, 21)), unrolled_by_hand(model)
    np.testing.assert_allclose(other(ids)[0], model(ids)[0], atol=2e-4)
    cached, _ = other(ids, other.init_cache(2, 32))
    np.testing.assert_allclose(cached, model(ids)[0], atol=2e-4)
    jax.tree.map(np.testing.assert_array_equal, model.unrolled().params, other.params)


def test_gradients_reach_every_parameter(model):
    _, grads = gradients(model.graphdef, model.params, tokens_of((3, 20)), packed_segments(3, 20))
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        layers = grad if path[1].key == "body" else grad[None]
        assert all(np.abs(layer).max() > 0 for layer in layers), path


def test_remat_does_not_change_gradients(model):
    config = dataclasses.replace(model.config, remat="full")
    graphdef, _, _ = abstract(lambda key: build_model(config, key))
    batch = tokens_of((2, 12)), packed_segments(2, 12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        gradients(graphdef, model.params, *batch),
        gradients(model.graphdef, model.params, *batch),
    )


MESHES = {
    "split": ("gemma2", MeshConfig(data=2, fsdp=2, tensor=2), AxisRules()),
    # Two key heads do not divide over four devices, and stay whole.
    "keys whole": ("gemma2", MeshConfig(data=1, fsdp=2, tensor=4), AxisRules(kv_heads=None)),
    "biases": ("gpt_neox", MeshConfig(data=2, fsdp=2, tensor=2), AxisRules()),
    "auto": ("gpt_neox", MeshConfig(data=2, fsdp=2, tensor=2, explicit=False), AxisRules()),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name):
    family, mesh, rules = MESHES[name]
    model = random_model(CONFIGS[family])
    ids, segments = tokens_of((4, 16)), packed_segments(4, 16)
    expected = gradients(model.graphdef, model.params, ids, segments)
    alone, cache = model(ids, model.init_cache(4, 24))
    alone_next, _ = model(ids[:, :1], cache)
    mesh = make_mesh(mesh)
    sharded = model.on(mesh, rules)
    with use_mesh(mesh, rules):
        rows = jax.NamedSharding(mesh, rules.spec(("batch", "seq")))
        ids, segments = jax.device_put(ids, rows), jax.device_put(segments, rows)
        found = gradients(model.graphdef, sharded.params, ids, segments)
        logits, cache = sharded(ids, sharded.init_cache(4, 24))
        last, _ = sharded(ids[:, :1], cache)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), found, expected
    )
    np.testing.assert_allclose(logits, alone, atol=2e-4)
    np.testing.assert_allclose(last, alone_next, atol=2e-4)


def test_on_a_mesh_that_does_not_divide_it(model):
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(InputError, match="does not divide mesh axis `tensor`=8"):
        model.on(mesh)


def test_bfloat16_is_close_and_finite(model):
    """Computed in bfloat16, from float32 parameters and from bfloat16 ones."""
    ids = tokens_of((2, 33))
    full, _ = model(ids)
    config = dataclasses.replace(model.config, dtype="bfloat16")
    graphdef, _, _ = abstract(lambda key: build_model(config, key))
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    for params in (model.params, stored):
        low, cache = Model(config, graphdef, params)(ids)
        assert low.dtype == jnp.float32
        error = np.sqrt(np.mean(np.square(low - full)) / np.mean(np.square(full)))
        assert 0 < error < 0.1
    cache = Model(config, graphdef, stored).init_cache(2, 40)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    cached, _ = Model(config, graphdef, stored)(ids, cache)
    error = np.sqrt(np.mean(np.square(cached - full)) / np.mean(np.square(full)))
    assert error < 0.1


PROMPTS = [[7, 7, 9, 7, 7, 9, 7], [5], list(range(20, 45))]


def test_greedy_generation_is_the_argmax_of_forward(model):
    out = generate(model, PROMPTS, Greedy(), 20, stop_tokens=())
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        text = np.array([[*prompt, *tokens]], np.int32)
        said = np.argmax(model(text)[0][0, len(prompt) - 1 : -1], axis=-1)
        np.testing.assert_array_equal(tokens, said)


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_speculative_decoding_goes_back_over_a_ring(model, kind):
    """Rejected drafts have overwritten the ring, and the text is still the plain one."""
    if kind == "lookup":
        draft = PromptLookup(num_tokens=3)
    else:
        noise = random_model(model.config, seed=5)
        close = jax.tree.map(lambda a, b: a + 0.05 * b, model.params, noise.params)
        draft = DraftModel(dataclasses.replace(model, params=close), num_tokens=3)
    plain = generate(model, PROMPTS, Greedy(), 24, stop_tokens=())
    found = generate(model, PROMPTS, Greedy(), 24, stop_tokens=(), draft=draft)
    for a, b in zip(found.tokens, plain.tokens, strict=True):
        np.testing.assert_array_equal(a, b)


def test_power_sampling_rewinds_by_snapshots_or_length(model):
    """A cache that goes back to any earlier place equals one that is read again from there."""
    settings = {"alpha": 1.5, "block": 8, "n_mcmc": 3, "t_max": 16, "n": 2, "stop_tokens": ()}
    kept = power_sample(model, PROMPTS, **settings, stride=4)
    again = power_sample(model, PROMPTS, **settings, stride=4, reuse="reread")
    assert kept.moved.max() > 0
    for a, b in zip(kept.tokens, again.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    prompts = [p for p in PROMPTS for _ in range(2)]
    for prompt, tokens, logprob in zip(prompts, kept.tokens, kept.logprob, strict=True):
        logits = model(np.array([[*prompt, *tokens]], np.int32))[0][0, len(prompt) - 1 : -1]
        said = jax.nn.log_softmax(logits)[np.arange(len(tokens)), np.array(tokens)]
        np.testing.assert_allclose(logprob, said.sum(), atol=1e-3)


def test_only_a_window_that_texts_exceed_is_recurrent(model):
    """Up to the window a cache is addressed by position, and goes back by its length alone."""
    module = model.module()
    window = getattr(model.config, "sliding_window", None)
    assert CacheLayout.of(module, 64).is_recurrent == (window is not None)
    assert not CacheLayout.of(module, 7).is_recurrent
    cache = jax.eval_shape(lambda: module.init_cache(2, 64))
    slots = {leaf.shape[-3] for leaf in jax.tree.leaves(cache.layers)}
    assert slots == ({64} if window is None else {window, 64})
