"""Head and cross-entropy: loss, sums and gradients against the oracle; chunks, meshes, any head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxalope import InputError
from jaxalope.layers.ops.linear_cross_entropy import head_cross_entropy, linear_cross_entropy
from jaxalope.sharding import MeshConfig, einsum, make_mesh, use_mesh

B, T, D, V = 4, 11, 16, 24

SETTINGS = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "capped table": {"softcap": 1.5, "vocab_first": True, "z_loss": 0.01},
    "sharpened": {"sharpening": 0.7, "softcap": 3.0},
    "no accuracy": {"accuracy": False},
}


def problem(length=T, vocab=V, dtype=jnp.float32, vocab_first=False):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(vocab, D) if vocab_first else (D, vocab))
    hidden = jnp.asarray(rng.normal(size=(B, length, D)), dtype)
    weights = rng.uniform(size=(B, length)) * (rng.uniform(size=(B, length)) > 0.2)
    labels = {
        "targets": jnp.asarray(rng.integers(0, vocab, (B, length)), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
    }
    return hidden, jnp.asarray(kernel, jnp.float32), labels


def with_gradients(hidden, kernel, labels, **settings):
    if "sharpening" in settings:
        settings["sharpen"] = labels["weights"][::-1]

    def loss(hidden, kernel):
        # Not 1: the cotangent of the loss has to reach both gradients.
        loss, sums = linear_cross_entropy(hidden, kernel, **labels, **settings)
        return 0.3 * loss, sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, kernel)


def close(actual, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        jax.device_get(actual),
        jax.device_get(expected),
    )


def as_function(kernel, softcap=None, vocab_first=False):
    """The same head, known only as a function."""

    def logits_of(x):
        names = "btd,vd->btv" if vocab_first else "btd,dv->btv"
        logits = einsum(names, x, kernel.astype(x.dtype), ("batch", "seq", "vocab"))
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    return logits_of


@pytest.mark.parametrize("chunk_size", [None, 7, 1], ids=["whole", "odd", "single"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_xla_is_the_oracle(setting, chunk_size):
    settings = SETTINGS[setting]
    arrays = problem(vocab_first=settings.get("vocab_first", False))
    found = with_gradients(*arrays, **settings, chunk_size=chunk_size)
    expected = with_gradients(*arrays, **settings, implementation="reference")
    assert ("accuracy" in found[0][1]) == settings.get("accuracy", True)
    assert ("entropy" in found[0][1]) == ("sharpening" in settings)
    close(found, expected)


def test_oracle_is_a_loop_over_tokens():
    hidden, kernel, labels = problem()
    targets, weights = (np.asarray(labels[name]) for name in ("targets", "weights"))
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    expected = {"nll": 0.0, "z_loss": 0.0, "accuracy": 0.0, "entropy": 0.0}
    for at in np.ndindex(B, T):
        log_z = np.log(np.sum(np.exp(logits[at])))
        log_p, right = logits[at] - log_z, np.argmax(logits[at]) == targets[at]
        expected["nll"] -= weights[at] * log_p[targets[at]]
        expected["z_loss"] += 0.1 * weights[at] * log_z**2
        expected["accuracy"] += weights[at] * right
        expected["entropy"] -= weights[at] * right * np.sum(np.exp(log_p) * log_p)
    loss, sums = linear_cross_entropy(
        hidden, kernel, **labels, z_loss=0.1, sharpen=labels["weights"], sharpening=0.5,
        implementation="reference",
    )  # fmt: skip
    close(sums, expected)
    np.testing.assert_allclose(
        loss, expected["nll"] + expected["z_loss"] + 0.5 * expected["entropy"], rtol=1e-5
    )


@pytest.mark.parametrize("max_logits", [10**6, 700, 1], ids=["whole", "padded", "single"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_any_head_is_the_oracle(setting, max_logits):
    settings = dict(SETTINGS[setting])
    hidden, kernel, labels = problem(vocab_first=settings.get("vocab_first", False))
    head = {name: settings.pop(name) for name in ("softcap", "vocab_first") if name in settings}
    if "sharpening" in settings:
        settings["sharpen"] = labels["weights"][::-1]

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(hidden, kernel):
        loss, sums = head_cross_entropy(
            as_function(kernel, **head), hidden, **labels, **settings, max_logits=max_logits
        )
        return 0.3 * loss, sums

    expected = with_gradients(hidden, kernel, labels, **SETTINGS[setting])
    close(jax.jit(loss)(hidden, kernel), expected)


def test_a_head_of_integers_and_a_trained_scale_under_scan_and_remat():
    """Arrays that have no gradient are arguments too: the rules run outside the scan's trace."""
    hidden, kernel, labels = problem()
    values, scale = jnp.round(kernel * 20).astype(jnp.int8), jnp.full((V,), 0.05)

    def loss(head, hidden, targets, weights):
        values, scale = head

        def logits_of(x):
            return (x @ values.astype(x.dtype)) * scale

        return head_cross_entropy(logits_of, hidden, targets, weights, max_logits=100)[0]

    def over_rows(scale, hidden):
        rows = (hidden[:, None], labels["targets"][:, None], labels["weights"][:, None])

        @jax.checkpoint
        def one(total, row):
            return total + loss((values, scale), *row), None

        return jax.lax.scan(one, 0.0, rows)[0]

    found = jax.jit(jax.value_and_grad(over_rows, argnums=(0, 1)))(scale, hidden)

    def whole(scale, hidden):
        head = values * scale
        return linear_cross_entropy(hidden, head, **labels, implementation="reference")[0]

    close(found, jax.value_and_grad(whole, argnums=(0, 1))(scale, hidden), 1e-4)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for sub in jaxprs_in_params(equation.params):
            yield from _equations(sub)


def _count(fn, *args):
    """Products, and the size of the largest array."""
    equations = list(_equations(jax.make_jaxpr(fn)(*args).jaxpr))
    sizes = [v.aval.size for e in equations for v in e.outvars if hasattr(v.aval, "size")]
    return sum(e.primitive.name == "dot_general" for e in equations), max(sizes)


@pytest.mark.parametrize("form", ["kernel", "function"])
def test_three_products_and_never_all_logits(form):
    hidden, kernel, labels = problem(length=48, vocab=100)
    limit = 4 * 12 * 100  # a quarter of the tokens; more than the kernel or hidden

    def loss(hidden, kernel):
        if form == "kernel":
            return linear_cross_entropy(hidden, kernel, **labels, max_logits=limit)[0]
        return head_cross_entropy(as_function(kernel), hidden, **labels, max_logits=limit)[0]

    grad = functools.partial(jax.grad, loss)
    assert _count(loss, hidden, kernel) == (1, limit)
    assert _count(grad(argnums=(0, 1)), hidden, kernel) == (3, limit)
    # What is frozen costs nothing.
    assert _count(grad(argnums=0), hidden, kernel) == (2, limit)
    assert _count(grad(argnums=1), hidden, kernel) == (2, limit)


def test_gradients_of_many_bfloat16_tokens_do_not_stall():
    """2,048 equal tokens in many chunks: bfloat16 partial sums would stop at 256 of them."""
    hidden, kernel = jnp.ones((8, 256, 4), jnp.bfloat16), jnp.zeros((4, 8), jnp.float32)
    targets = jnp.zeros((8, 256), jnp.int32)
    grad = jax.grad(
        lambda w: linear_cross_entropy(hidden, w, targets, jnp.ones((8, 256)), chunk_size=32)[0]
    )(kernel)
    np.testing.assert_allclose(grad[:, 0], -2048 * 7 / 8, rtol=1e-2)
    np.testing.assert_allclose(grad[:, 1:], 2048 / 8, rtol=1e-2)


def test_bfloat16_is_near_the_oracle():
    hidden, kernel, labels = problem(dtype=jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    found = with_gradients(hidden, kernel, labels, chunk_size=7)
    expected = with_gradients(
        hidden.astype(jnp.float32), rounded, labels, implementation="reference"
    )
    assert found[1][0].dtype == jnp.bfloat16 and found[1][1].dtype == jnp.float32
    close(found[0], expected[0], 1e-4)  # float32 logits: only the kernel was rounded
    for a, b in zip(found[1], expected[1], strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 5e-3, error


MESHES = {
    "explicit": MeshConfig(data=2, fsdp=2, tensor=2),
    "auto": MeshConfig(data=2, fsdp=2, tensor=2, explicit=False),
    "vocabulary": MeshConfig(data=1, fsdp=2, tensor=4),
    "size 1": MeshConfig(data=4, fsdp=1, tensor=1, context=2),
}


@pytest.mark.parametrize("form", ["kernel", "function"])
@pytest.mark.parametrize("name", MESHES)
def test_meshes_give_what_one_device_gives(name, form):
    hidden, kernel, labels = problem()
    settings = {"z_loss": 0.1, "sharpening": 0.5}

    def loss(hidden, kernel, labels):
        more = settings | {"sharpen": labels["weights"]}
        if form == "kernel":
            # Three chunks of a device's tokens, the last one padded.
            return linear_cross_entropy(hidden, kernel, **labels, **more, chunk_size=5)
        return head_cross_entropy(as_function(kernel), hidden, **labels, **more, max_logits=100)

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    alone = jax.jit(grad)(hidden, kernel, labels)
    with use_mesh(make_mesh(MESHES[name])) as mesh:
        place = functools.partial(jax.sharding.NamedSharding, mesh)
        rows = place(jax.P(("data", "fsdp")))
        args = (
            jax.device_put(hidden, rows),
            jax.device_put(kernel, place(jax.P("fsdp", "tensor"))),
            jax.device_put(labels, rows),
        )
        compiled = jax.jit(grad).lower(*args).compile()
        found = compiled(*args)
    close(found, alone, 5e-5)
    if name == "vocabulary" and form == "kernel":
        # Logits of a device are of its own columns: no array has a token's whole row of them.
        text = compiled.as_text()
        assert f"f32[5,{V // 4}]" in text and f"f32[5,{V}]" not in text


def test_under_vmap():
    hidden, kernel, labels = problem()
    each = jax.vmap(
        jax.value_and_grad(
            lambda h, t, w: linear_cross_entropy(h[None], kernel, t[None], w[None], chunk_size=3)[0]
        )
    )(hidden, labels["targets"], labels["weights"])
    loss, dhidden = jax.value_and_grad(lambda h: linear_cross_entropy(h, kernel, **labels)[0])(
        hidden
    )
    close((jnp.sum(each[0]), each[1]), (loss, dhidden))


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_calls_are_named():
    hidden, kernel, labels = problem()
    with pytest.raises(InputError, match=r"kernel \(24, 16\) does not fit .*vocab_first=False"):
        linear_cross_entropy(hidden, kernel.T, **labels)
    with pytest.raises(InputError, match="implementation='cuda'"):
        linear_cross_entropy(hidden, kernel, **labels, implementation="cuda")
    with pytest.raises(InputError, match="softcap=0"):
        linear_cross_entropy(hidden, kernel, **labels, softcap=0)
    with pytest.raises(InputError, match=r"chunk_size=-1"):
        linear_cross_entropy(hidden, kernel, **labels, chunk_size=-1)
    with pytest.raises(InputError, match="max_logits=0"):
        linear_cross_entropy(hidden, kernel, **labels, max_logits=0)
    with pytest.raises(InputError, match=r"weights \(4, 10\) does not fit hidden"):
        head_cross_entropy(as_function(kernel), hidden, labels["targets"], labels["weights"][:, 1:])
