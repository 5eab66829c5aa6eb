"""Gemma-2 and GPT-NeoX against ``transformers``' own, on fresh random weights, both ways."""

import copy
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope import Greedy, generate
from jaxalope.model import build_model
from jaxalope.model.published import published_tensors
from jaxalope.sharding import abstract

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import peers  # noqa: E402

VOCAB, WINDOW = 83, 6
SHARED = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 72, "initializer_range": 0.2}


def gemma2():
    """Layers of both kinds, texts far longer than the window, caps that scores and logits reach."""
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SHARED,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=7,
            sliding_window=WINDOW,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0,
            rope_theta=500.0,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
            attn_implementation="eager",
        )
    )


def gpt_neox(parallel):
    """Biases, half of each head turned."""
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **SHARED,
            num_hidden_layers=3,
            num_attention_heads=5,
            rotary_pct=0.5,
            rotary_emb_base=500.0,
            use_parallel_residual=parallel,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


FAMILIES = {
    "gemma2": gemma2,
    "gpt_neox parallel": lambda: gpt_neox(True),
    "gpt_neox serial": lambda: gpt_neox(False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    torch.manual_seed(0)
    peer = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
    return peer, peers.from_transformers(peer)


def ids_of(shape, seed=0):
    return np.random.default_rng(seed).integers(3, VOCAB, shape).astype(np.int64)


def logits_of(peer, ids, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return peer(torch.tensor(ids), attention_mask=mask).logits.numpy()


def test_logits(pair):
    peer, model = pair
    ids = ids_of((2, 77))
    expected = logits_of(peer, ids)
    np.testing.assert_allclose(model(ids)[0], expected, atol=1e-4)
    assert expected.std() > 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"sliding_window": WINDOW + 1},
        {"query_pre_attn_scalar": 12},
        {"rope_theta": 10000.0},
        {"rotary_pct": 0.25},
        {"use_parallel_residual": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_matters(pair, change):
    """So that agreement elsewhere says something about each."""
    _, model = pair
    ((name, value),) = change.items()
    ids = ids_of((2, 77))
    if not hasattr(model.config, name):
        return
    value = not model.config.use_parallel_residual if name == "use_parallel_residual" else value
    config = dataclasses.replace(model.config, **{name: value})
    graphdef, _, _ = abstract(lambda key: build_model(config, key))
    other, _ = dataclasses.replace(model, config=config, graphdef=graphdef)(ids)
    assert np.abs(other - model(ids)[0]).max() > 1e-2


def test_decode_equals_their_forward(pair):
    """A prompt that the ring holds, one that it does not, then one token at a time."""
    peer, model = pair
    ids = ids_of((2, 40), seed=5)
    cache, rows, at = model.init_cache(2, 40), [], 0
    for count in (4, 15, *[1] * 21):
        logits, cache = model(ids[:, at : at + count], cache)
        rows.append(logits)
        at += count
    np.testing.assert_allclose(np.concatenate(rows, 1), logits_of(peer, ids), atol=1e-4)


def test_loss_and_every_gradient(pair):
    peer, model = pair
    peer = copy.deepcopy(peer)
    ids = ids_of((2, 30), seed=1)
    expected = peer(torch.tensor(ids), labels=torch.tensor(ids)).loss
    expected.backward()

    def loss(params):
        logits = nnx.merge(model.graphdef, params)(jnp.asarray(ids, jnp.int32))[0]
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logprobs, ids[:, 1:, None], -1))

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)

    # The peer's gradients go through its own files, so that names need no second table.
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(parameter.grad)
    theirs = published_tensors(peers.from_transformers(peer))
    ours = published_tensors(dataclasses.replace(model, params=grads))
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = max(float(np.abs(theirs[name]).max()), 1e-6)
        np.testing.assert_allclose(
            ours[name] / scale, theirs[name] / scale, atol=1e-3, err_msg=name
        )


def test_greedy_generation(pair):
    peer, model = pair
    prompt = ids_of((1, 9), seed=2)
    with torch.no_grad():
        expected = peer.generate(
            torch.tensor(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
    ours = generate(model, prompt.tolist(), Greedy(), 24, stop_tokens=())
    np.testing.assert_array_equal(ours.tokens[0], expected[0, 9:].numpy())


def test_transformers_loads_what_we_write(pair):
    _, model = pair
    ids = ids_of((1, 30), seed=3)
    np.testing.assert_allclose(
        logits_of(peers.to_transformers(model), ids), model(ids)[0], atol=1e-4
    )


def test_left_padding_as_segments(pair):
    """A left-padded batch under an attention mask equals the same rows as our segments."""
    peer, model = pair
    ids = ids_of((2, 40), seed=4)
    mask = np.ones((2, 40), np.int64)
    mask[0, :13] = 0
    expected = logits_of(peer, ids, mask)
    found = np.asarray(model(ids, segment_ids=mask.astype(np.int32))[0])
    np.testing.assert_allclose(found[0, 13:], expected[0, 13:], atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
