"""The mixture of experts: routing, dropless dispatch, loads, and one device against many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxalope import InputError
from jaxalope.layers.moe import MoE, routed_scaling_factor
from jaxalope.sharding import AxisRules, MeshConfig, init_params, make_mesh, split, use_mesh

B, T, D, F, E, K = 2, 16, 12, 10, 8, 2
EXACT = jax.lax.Precision.HIGHEST


def build(key=0, *, bias=None, features=D, hidden=F, num_experts=E, top_k=K, **options):
    """A mixture whose weights are of order one, and whose bias is not zero."""
    moe = MoE(
        features, hidden, num_experts=num_experts, top_k=top_k, rngs=nnx.Rngs(key), stddev=0.4,
        **options,
    )  # fmt: skip
    if bias is None:
        bias = 0.2 * jax.random.normal(jax.random.key(key + 1), (num_experts,))
    moe.router.bias[...] = jnp.asarray(bias, jnp.float32)
    return moe


def inputs(batch=B, length=T, seed=5):
    return jax.random.normal(jax.random.key(seed), (batch, length, D))


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, params, x, valid=None):
    """``(y, load)``; jitted, so that tests of one structure and shape compile it once."""
    return nnx.merge(graphdef, params)(x, valid=valid)


@functools.partial(jax.jit, static_argnums=0)
def route(graphdef, params, x):
    return nnx.merge(graphdef, params).router(x)


@functools.partial(jax.jit, static_argnums=0)
def gradients(graphdef, params, x, cotangent):
    """In the parameters and in ``x``."""
    return jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x)[0], params, x)[1](cotangent)


def scores_of(params, x):
    return np.asarray(jax.nn.sigmoid(jnp.matmul(x, params["router"]["kernel"], precision=EXACT)))


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


@functools.partial(jax.jit, static_argnames=("top_k", "scaling"))
def dense(params, x, top_k=K, scaling=1.0):
    """Every expert on every token, in plain jnp: what the layer must compute, and its gradients."""
    experts = params["experts"]
    scores = jax.nn.sigmoid(x @ params["router"]["kernel"])
    ids = jax.lax.top_k(scores + params["router"]["bias"], top_k)[1]
    chosen = jnp.sum(jax.nn.one_hot(ids, scores.shape[-1]), axis=-2)
    weights = jax.lax.stop_gradient(chosen) * scores
    weights = scaling * weights / jnp.sum(weights, axis=-1, keepdims=True)
    outputs = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(
        x, experts["gate"], experts["up"], experts["down"]
    )
    y = jnp.einsum("bte,ebtd->btd", weights, outputs)
    shared = [params["shared"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down")]
    return y + swiglu(x, *shared)


@functools.partial(jax.jit, static_argnames=("scaling",))
def dense_gradients(params, x, cotangent, scaling=1.0):
    return jax.vjp(functools.partial(dense, scaling=scaling), params, x)[1](cotangent)


def assert_trees_close(actual, expected, atol):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=atol, rtol=atol, err_msg=jax.tree_util.keystr(path))


class TestRouting:
    def test_bias_chooses_and_does_not_weigh(self):
        x = inputs()
        graphdef, free = split(build(bias=np.zeros(E)))
        _, forced = split(build(bias=np.eye(E)[3] * 10))
        ids, weights = route(graphdef, forced, x)
        assert np.all(np.any(ids == 3, axis=-1))
        assert not np.all(np.any(route(graphdef, free, x)[0] == 3, axis=-1))
        picked = np.take_along_axis(scores_of(forced, x), np.asarray(ids), axis=-1)
        np.testing.assert_allclose(weights, picked / picked.sum(-1, keepdims=True), atol=1e-6)

    def test_weights_without_renormalisation_are_the_scores(self):
        x = inputs()
        graphdef, params = split(build(renormalize=False, routed_scaling_factor=3.0))
        ids, weights = route(graphdef, params, x)
        picked = np.take_along_axis(scores_of(params, x), np.asarray(ids), axis=-1)
        np.testing.assert_allclose(weights, 3 * picked, atol=1e-6)

    def test_groups(self):
        """Against a loop over tokens written from the definition."""
        graphdef, params = split(build(num_experts=12, top_k=3, num_expert_groups=4, topk_groups=2))
        x = inputs()
        ids, _ = route(graphdef, params, x)
        scores = scores_of(params, x) + np.asarray(params["router"]["bias"])
        limited = 0
        for got, token in zip(ids.reshape(-1, 3), scores.reshape(-1, 12), strict=True):
            groups = token.reshape(4, 3)
            group_scores = np.sort(groups, axis=1)[:, -2:].sum(1)
            kept = np.argsort(-group_scores)[:2]
            allowed = [e for e in range(12) if e // 3 in kept]
            expected = sorted(allowed, key=lambda e: -token[e])[:3]
            assert list(got) == expected
            limited += set(expected) != set(np.argsort(-token)[:3])
        assert limited  # otherwise the groups were never felt

    def test_a_negative_score_is_not_beaten_by_a_closed_group(self):
        options = {"num_experts": 4, "num_expert_groups": 2, "topk_groups": 1}
        graphdef, params = split(build(bias=[-3.0, -3.0, -9.0, -9.0], **options))
        assert np.all(route(graphdef, params, inputs())[0] < 2)

    def test_router_is_float32_under_bfloat16_activations(self):
        graphdef, params = split(build())
        x = inputs().astype(jnp.bfloat16)
        _, weights = route(graphdef, params, x)
        _, expected = route(graphdef, params, x.astype(jnp.float32))
        assert weights.dtype == jnp.float32
        np.testing.assert_array_equal(weights, expected)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"top_k": 9}, "top_k=9"),
            ({"top_k": 0}, "top_k=0"),
            ({"num_expert_groups": 3}, "num_expert_groups=3"),
            ({"num_expert_groups": 4, "topk_groups": 5}, "topk_groups=5"),
            ({"num_expert_groups": 8, "topk_groups": 4}, "num_expert_groups=8"),
            ({"num_expert_groups": 4, "topk_groups": 1, "top_k": 3}, "top_k=3"),
        ],
    )
    def test_numbers_that_do_not_fit(self, options, message):
        with pytest.raises(InputError, match=message):
            build(**options)


class TestAgainstDense:
    @pytest.mark.parametrize("implementation", [None, "xla", "reference"])
    def test_values_and_gradients(self, implementation):
        graphdef, params = split(build(routed_scaling_factor=2.446, implementation=implementation))
        x, cotangent = inputs(), inputs(seed=6)
        y, _ = apply(graphdef, params, x)
        np.testing.assert_allclose(y, dense(params, x, scaling=2.446), atol=1e-5)
        actual = gradients(graphdef, params, x, cotangent)
        assert_trees_close(actual, dense_gradients(params, x, cotangent, scaling=2.446), 2e-5)
        assert not np.any(actual[0]["router"]["bias"])
        assert np.abs(actual[0]["router"]["kernel"]).max() > 1e-2

    def test_router_gradient_is_the_slope_of_the_output(self):
        """Finite differences through scores, renormalisation and experts."""
        # The bias fixes which experts are chosen: the slope across a change of choice is no slope.
        graphdef, params = split(build(bias=10.0 * np.isin(np.arange(E), [1, 4])))
        x, cotangent = inputs(), inputs(seed=6)
        direction = jax.random.normal(jax.random.key(8), (D, E))

        def loss(step):
            kernel = params["router"]["kernel"] + step * direction
            moved = {**params, "router": {**params["router"], "kernel": kernel}}
            return np.vdot(np.float64(apply(graphdef, moved, x)[0]), np.float64(cotangent))

        slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
        gradient = gradients(graphdef, params, x, cotangent)[0]["router"]["kernel"]
        np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=2e-3)

    def test_every_token_to_one_expert(self):
        """Dropless: an expert takes all that it is sent, and the others may have nothing."""
        graphdef, params = split(build(bias=np.eye(E)[5] * 10, top_k=1))
        x = inputs(4, 40)
        y, load = apply(graphdef, params, x)
        np.testing.assert_array_equal(load, np.eye(E)[5] * 160)
        np.testing.assert_allclose(y, dense(params, x, top_k=1), atol=1e-5)

    def test_bfloat16(self):
        graphdef, params = split(build())
        x = inputs().astype(jnp.bfloat16)
        y, load = apply(graphdef, params, x)
        assert y.dtype == jnp.bfloat16 and load.dtype == jnp.float32
        expected = dense(params, x.astype(jnp.float32))
        error = np.linalg.norm(y.astype(jnp.float32) - expected) / np.linalg.norm(expected)
        assert error < 8e-3, error

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_few_tokens_take_another_path_to_the_same_result(self, tokens):
        graphdef, params = split(build())
        x, cotangent = inputs(tokens, 1), inputs(tokens, 1, seed=7)
        few, _ = apply(graphdef, params, x)
        np.testing.assert_allclose(few, dense(params, x), atol=1e-5)
        assert_trees_close(
            gradients(graphdef, params, x, cotangent), dense_gradients(params, x, cotangent), 2e-5
        )
        padded = jnp.zeros((B * T, D)).at[:tokens].set(x[:, 0]).reshape(B, T, D)
        together, _ = apply(graphdef, params, padded)
        np.testing.assert_allclose(few[:, 0], together.reshape(-1, D)[:tokens], atol=1e-5)
        for array, sorts in ((x, False), (padded, True)):
            jaxpr = jax.make_jaxpr(apply, static_argnums=0)(graphdef, params, array)
            assert ("argsort" in str(jaxpr)) == sorts

    def test_no_shared_expert(self):
        graphdef, params = split(build(num_shared_experts=0))
        assert set(params) == {"router", "experts"}
        assert np.isfinite(apply(graphdef, params, inputs(1, 1))[0]).all()


class TestLoad:
    def test_counts_choices(self):
        graphdef, params = split(build())
        x = inputs()
        _, load = apply(graphdef, params, x)
        ids, _ = route(graphdef, params, x)
        np.testing.assert_array_equal(load, np.bincount(np.ravel(ids), minlength=E))
        assert load.sum() == B * T * K

    @pytest.mark.parametrize("length, experts", [(T, E), (4, 4 * E)], ids=["many", "few"])
    def test_padding_is_not_counted_and_changes_nothing(self, length, experts):
        graphdef, params = split(build(num_experts=experts))
        x = inputs(length=length)
        valid = jnp.arange(length)[None] < jnp.asarray([[length - 3], [length // 2]])
        y, load = apply(graphdef, params, x, valid)
        padding = jnp.where(valid[..., None], x, 1e4)
        changed, same_load = apply(graphdef, params, padding, valid)
        ids, _ = route(graphdef, params, x)
        np.testing.assert_array_equal(load, np.bincount(np.ravel(ids[valid]), minlength=experts))
        np.testing.assert_array_equal(load, same_load)
        np.testing.assert_allclose(y[valid], dense(params, x)[valid], atol=1e-5)
        np.testing.assert_allclose(y[valid], changed[valid], atol=1e-5)
        assert np.isfinite(y).all() and np.isfinite(changed).all()

    def test_has_no_gradient(self):
        graphdef, params = split(build())
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(apply(graphdef, p, inputs(1, 1))[1])))(params)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.fixture(scope="module")
def one_device():
    return jax.device_get(TestSharded.run(None, None, 8, 4))


class TestSharded:
    """Eight simulated devices against one, values, loads and gradients."""

    CASES = (
        ({"fsdp": 2, "expert": 2, "tensor": 2}, True),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, False),
        ({"data": 2, "expert": 4}, True),
        ({"fsdp": 2, "tensor": 2, "context": 2}, True),
    )

    @staticmethod
    def run(mesh, rules, batch, length):
        graphdef, params = init_params(lambda key: build(), jax.random.key(0), mesh, rules)
        x, cotangent = inputs(batch, length), inputs(batch, length, seed=6)
        valid = jnp.arange(length)[None] < jnp.arange(length - batch, length)[:, None] + 1

        def step(params, x):
            def loss(params, x):
                y, load = nnx.merge(graphdef, params)(x, valid=valid)
                return jnp.sum(y * jnp.where(valid[..., None], cotangent, 0)), (y, load)

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

        return jax.jit(step)(params, x)

    @pytest.mark.parametrize("sizes, explicit", CASES)
    def test_is_one_device(self, sizes, explicit, one_device):
        rules = AxisRules(seq="context") if "context" in sizes else AxisRules()
        mesh = make_mesh(MeshConfig(explicit=explicit, **{"data": 1, **sizes}))
        with use_mesh(mesh, rules):
            actual = self.run(mesh, rules, 8, 4)
        assert_trees_close(jax.device_get(actual), one_device, 2e-5)

    def test_decoding_is_one_device(self):
        expected = self.run(None, None, 8, 1)
        rules = AxisRules()
        mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
        with use_mesh(mesh, rules):
            actual = self.run(mesh, rules, 8, 1)
        assert_trees_close(jax.device_get(actual), jax.device_get(expected), 2e-5)


def test_parameters_and_their_axes():
    moe = build()
    axes = {
        path: param.get_metadata()["axes"]
        for path, param in nnx.to_flat_state(nnx.state(moe))
        if path[0] != "shared"
    }
    assert axes == {
        ("router", "kernel"): ("embed", None),
        ("router", "bias"): ("experts",),
        ("experts", "gate"): ("experts", "embed", "mlp"),
        ("experts", "up"): ("experts", "embed", "mlp"),
        ("experts", "down"): ("experts", "mlp", "embed"),
    }
    assert moe.router.bias.get_metadata()["gradient_free"]


@pytest.mark.parametrize(
    "num_experts, top_k, published",
    [(64, 6, 2.446), (384, 8, 2.827)],
    ids=["moonlight", "kimi_k2"],
)
def test_routed_scaling_factor_is_the_published_one(num_experts, top_k, published):
    factor = routed_scaling_factor(num_experts, top_k, num_samples=4000)
    assert abs(factor - published) < 2e-3
    assert abs(factor - routed_scaling_factor(num_experts, top_k, seed=1, num_samples=4000)) < 2e-3


def test_golden(fixtures):
    """transformers' Kimi Linear: the router and the whole layer, with a bias that matters."""
    folder = fixtures / "kimi_linear_tiny"
    io = np.load(folder / "io.npz")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe."
    get = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    moe = MoE(48, 24, num_experts=8, top_k=2, routed_scaling_factor=2.446, rngs=nnx.Rngs(0))
    moe.router.kernel[...] = jnp.asarray(get["gate.weight"].T)
    moe.router.bias[...] = jnp.asarray(get["gate.e_score_correction_bias"])
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        stacked = np.stack([get[f"experts.{e}.{theirs}.weight"].T for e in range(8)])
        getattr(moe.experts, ours)[...] = jnp.asarray(stacked)
        shared = getattr(moe.shared, f"{ours}_proj")
        shared.kernel[...] = jnp.asarray(get[f"shared_experts.{ours}_proj.weight"].T)
    graphdef, params = split(moe)
    x = jnp.asarray(io["gate_x"])[None]
    ids, weights = (np.asarray(a[0]) for a in route(graphdef, params, x))
    ours, theirs = np.argsort(ids, -1), np.argsort(io["gate_indices"], -1)
    for a, b in ((ids, io["gate_indices"]), (weights, io["gate_weights"])):
        a, b = np.take_along_axis(a, ours, -1), np.take_along_axis(b, theirs, -1)
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(apply(graphdef, params, x)[0][0], io["moe_y"], atol=1e-5)
    few = apply(graphdef, params, x[:, :4])[0][0]
    np.testing.assert_allclose(few, io["moe_y"][:4], atol=1e-5)
