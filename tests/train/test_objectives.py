import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.configs import NextToken, get_experiment
from jaxalope.layers.linear import Linear
from jaxalope.layers.ops.linear_cross_entropy import PlainHead
from jaxalope.model.registry import build_model
from jaxalope.sharding import MeshConfig, make_mesh, use_mesh
from jaxalope.train.objectives import make_objective
from jaxalope.train.sums import shift

KEY = jax.random.key(0)
HEADS = ("tiny", "gemma2_tiny", "gpt_neox_tiny", "llada_tiny", "calm_autoencoder_tiny")


def _oracle(logits, batch, z_loss):
    """Token by token in float64: (loss, weight, nll, correct)."""
    loss = weight = nll_sum = correct = 0.0
    rows, length = batch["tokens"].shape
    for r in range(rows):
        for t in range(length - 1):
            segment = batch["segment_ids"][r, t]
            if segment == 0 or batch["segment_ids"][r, t + 1] != segment:
                continue
            target = batch["tokens"][r, t + 1]
            w = batch.get("loss_weights", np.ones((rows, length)))[r, t + 1]
            x = logits[r, t].astype(np.float64)
            log_z = np.log(np.sum(np.exp(x)))
            nll = log_z - x[target]
            loss += w * (nll + z_loss * log_z**2)
            nll_sum += w * nll
            weight += w
            correct += w * (np.argmax(x) == target)
    return loss, weight, nll_sum, correct


@pytest.mark.parametrize("weighted", [False, True])
def test_next_token_is_the_sum_over_targets_inside_documents(toy, weighted):
    model, batch = toy.build(KEY), toy.batch()
    if weighted:
        rng = np.random.default_rng(1)
        batch["loss_weights"] = rng.integers(0, 3, (8, 8)).astype(np.float32) / 2
    logits = np.asarray(model.logits(model.hidden_states(batch["tokens"])[0]))
    expected = _oracle(logits, batch, z_loss=0.1)
    loss, weight, sums = jax.jit(lambda b: make_objective(NextToken(z_loss=0.1))(model, b, KEY))(
        batch
    )
    got = (loss, weight, sums["nll"], sums["accuracy"])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(loss - sums["nll"], sums["z_loss"], rtol=1e-4)
    assert (weight != 42) if weighted else (weight == 42)
    assert sums["stats"]["block"]["router"]["bias"].shape == (2, 4)


def test_without_segments_a_row_is_one_document():
    targets, weights = shift({"tokens": jnp.array([[5, 6, 7]])})
    np.testing.assert_array_equal(targets[:, :2], [[6, 7]])
    np.testing.assert_array_equal(weights, [[1, 1, 0]])


@pytest.mark.parametrize("name", HEADS)
def test_plain_heads_are_their_logits(name):
    """A model whose logits are not its kernel's, and that says so nowhere, would learn another."""
    model = nnx.eval_shape(lambda: build_model(get_experiment(name).model, KEY))
    owner = model.lm_head if hasattr(model, "lm_head") else model.embed
    param = owner.kernel if hasattr(owner, "kernel") else owner.embedding
    param.set_value(jax.random.normal(KEY, param.shape))
    head = model.plain_head()
    kernel = head.kernel.T if head.vocab_first else head.kernel
    hidden = jax.random.normal(KEY, (1, 3, kernel.shape[0]))
    found = hidden @ kernel
    if head.softcap is not None:
        found = head.softcap * jnp.tanh(found / head.softcap)
    np.testing.assert_allclose(found, model.logits(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", ["lora", "bias", "kernel_scale"])
def test_no_other_map_is_a_plain_one(more):
    linear = Linear({"embed": 4}, {"vocab": 6}, rngs=nnx.Rngs(0))
    assert linear.plain_kernel() is not None
    setattr(linear, more, nnx.Param(jnp.ones(6)))
    assert linear.plain_kernel() is None


def test_a_plain_head_and_its_function_train_alike(toy):
    """The two ways to the loss: through the kernel, and through ``logits``."""
    model, batch = toy.build(KEY), toy.batch()
    graphdef, params = nnx.split(model)

    def loss(params, plain):
        model = nnx.merge(graphdef, params)
        if plain:
            kernel = model.lm_head.kernel[...]
            model.plain_head = lambda: PlainHead(kernel)
        return make_objective(NextToken(z_loss=0.1, max_logits=200))(model, batch, KEY)[0]

    one, other = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, p) for p in (0, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def test_a_sharded_vocabulary_gives_the_sums_of_one_device(toy):
    batch = toy.batch()
    objective = make_objective(NextToken(z_loss=0.1, max_logits=64))

    def run(batch):
        loss, weight, sums = objective(toy.build(KEY), batch, KEY)
        return {"loss": loss, "weight": weight, **sums}

    alone = jax.device_get(jax.jit(run)(batch))
    for config in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(tensor=4, explicit=False)):
        with use_mesh(make_mesh(config)):
            sharded = jax.device_get(jax.jit(lambda b: run(b))(batch))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone, sharded)
