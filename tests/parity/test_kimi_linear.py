"""Kimi Linear against ``transformers``' own, on fresh random weights, both ways."""

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
from jaxalope.model.published import published_tensors

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))
import peers  # noqa: E402


def fresh_peer(seed, **changes):
    """A ``transformers`` Kimi Linear with random weights, norms and biases included."""
    linear = {
        "head_dim": 16,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3, 5],
        "full_attn_layers": [4, 6],
    }
    options = {
        "vocab_size": 83,
        "hidden_size": 40,
        "intermediate_size": 72,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "kv_lora_rank": 20,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "initializer_range": 0.15,
        "linear_attn_config": linear,
        "mla_use_nope": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(seed)
    peer = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in peer.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    return peer


@pytest.fixture(scope="module", params=[0, 1])
def pair(request):
    peer = fresh_peer(request.param)
    return peer, peers.from_transformers(peer)


def ids_of(shape, vocab, seed=0):
    return np.random.default_rng(seed).integers(3, vocab, shape).astype(np.int64)


def test_logits(pair):
    peer, model = pair
    ids = ids_of((2, 77), 83)
    with torch.no_grad():
        expected = peer(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids)[0], expected, atol=1e-4)


def test_loss_and_every_gradient(pair):
    peer, model = pair
    peer = copy.deepcopy(peer)
    ids = ids_of((2, 70), 83, seed=1)
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
    for name in ours:
        if name.endswith("e_score_correction_bias"):
            continue
        scale = max(float(np.abs(theirs[name]).max()), 1e-6)
        np.testing.assert_allclose(
            ours[name] / scale, theirs[name] / scale, atol=1e-3, err_msg=name
        )


def test_greedy_generation(pair):
    peer, model = pair
    prompt = ids_of((1, 9), 83, seed=2)
    with torch.no_grad():
        expected = peer.generate(
            torch.tensor(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
    ours = generate(model, prompt.tolist(), Greedy(), 24, stop_tokens=())
    np.testing.assert_array_equal(ours.tokens[0], expected[0, 9:].numpy())


def test_transformers_loads_what_we_write(pair):
    _, model = pair
    ids = ids_of((1, 30), 83, seed=3)
    returned = peers.to_transformers(model)
    with torch.no_grad():
        np.testing.assert_allclose(
            returned(torch.tensor(ids)).logits.numpy(), model(ids)[0], atol=1e-4
        )


def test_left_padding_as_segments(pair):
    """A left-padded batch under an attention mask equals the same rows as our segments."""
    peer, model = pair
    ids = ids_of((2, 40), 83, seed=4)
    mask = np.ones((2, 40), np.int64)
    mask[0, :13] = 0
    with torch.no_grad():
        expected = peer(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    found = np.asarray(model(ids, segment_ids=mask.astype(np.int32))[0])
    np.testing.assert_allclose(found[0, 13:], expected[0, 13:], atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
