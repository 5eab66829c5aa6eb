import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalope.configs import AdamW, Muon, get_experiment
from jaxalope.errors import InputError
from jaxalope.model.registry import build_model
from jaxalope.sharding import AxisRules, MeshConfig, abstract, make_mesh, use_mesh
from jaxalope.train.muon import Matrix, _route, as_matrix
from jaxalope.train.optimizers import (
    ParamInfo,
    decays,
    make_optimizer,
    matrices,
    param_info,
    trainable,
)

AXES = {
    "embed.embedding": ("vocab", "embed"),
    "lm_head.kernel": ("embed", "vocab"),
    "body.norm.scale": ("layers", "embed"),
    "body.q_proj.kernel": ("layers", "embed", "heads", "head_dim"),
    "body.k_proj.kernel": ("layers", "embed", "heads", "head_dim"),
    "body.o_proj.kernel": ("layers", "heads", "head_dim", "embed"),
    "body.q_conv": ("layers", "heads", "head_dim", None),
    "body.A_log": ("layers", "heads"),
    "body.dt_bias": ("layers", "heads", "head_dim"),
    "body.router.kernel": ("layers", "embed", None),
    "body.experts.up": ("layers", "experts", "embed", "mlp"),
    "body.experts.down": ("layers", "experts", "mlp", "embed"),
    "head.gate_proj.kernel": ("embed", "mlp"),
}
SIZES = {"layers": 2, "embed": 8, "vocab": 12, "heads": 2, "head_dim": 6, "experts": 4, "mlp": 4}
INFO = {n: ParamInfo(tuple(n.split(".")), axes, False) for n, axes in AXES.items()}
# The matrices of AXES, written out: (count, rows, columns).
MATRICES = {
    "body.q_proj.kernel": (2, 8, 12),
    "body.k_proj.kernel": (2, 8, 12),
    "body.o_proj.kernel": (2, 12, 8),
    "body.router.kernel": (2, 8, 3),
    "body.experts.up": (8, 8, 4),
    "body.experts.down": (8, 4, 8),
    "head.gate_proj.kernel": (1, 8, 4),
}


def _arrays(seed):
    rng = np.random.default_rng(seed)
    return {
        n: rng.normal(size=[SIZES.get(a, 3) for a in axes]).astype(np.float32)
        for n, axes in AXES.items()
    }


def _orthogonal(m):
    x = m / np.linalg.norm(m)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def _oracle(params, gradients, rate, wd=0.1, b1=0.9, b2=0.95, eps=1e-8, muon=True):
    """The published rules, one matrix at a time, in float64."""
    params = {n: p.astype(np.float64) for n, p in params.items()}
    m = {n: np.zeros_like(p) for n, p in params.items()}
    v = {n: np.zeros_like(p) for n, p in params.items()}
    for t, grads in enumerate(gradients, 1):
        for n, p in params.items():
            g = grads[n].astype(np.float64)
            if muon and n in MATRICES:
                m[n] = 0.95 * m[n] + g
                u = np.reshape(0.95 * m[n] + g, MATRICES[n])
                scale = 0.2 * np.sqrt(max(MATRICES[n][1:]))
                u = np.reshape([scale * _orthogonal(x) for x in u], p.shape)
            else:
                m[n] = b1 * m[n] + (1 - b1) * g
                v[n] = b2 * v[n] + (1 - b2) * g**2
                u = m[n] / (1 - b1**t) / (np.sqrt(v[n] / (1 - b2**t)) + eps)
            keep = 0.0 if n.endswith(("A_log", "dt_bias")) else wd
            params[n] = p - rate * (u + keep * p)
    return params


def _train(config, params, gradients, rate):
    optimizer = make_optimizer(config, optax.constant_schedule(rate), INFO)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return {n: p + updates[n] for n, p in params.items()}, state

    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


@pytest.mark.parametrize("config", [Muon(), AdamW()], ids=lambda c: c.kind)
def test_several_steps_equal_the_float64_oracle(config):
    params, gradients = _arrays(0), [_arrays(seed) for seed in range(1, 5)]
    got, state = _train(config, params, gradients, rate=0.05)
    expected = _oracle(params, gradients, rate=0.05, muon=config.kind == "muon")
    for name in AXES:
        np.testing.assert_allclose(got[name], expected[name], atol=2e-5, err_msg=name)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim)
    muon = set(state.muon.momentum) if config.kind == "muon" else set()
    assert muon == (set(MATRICES) if config.kind == "muon" else set())
    assert set(state.adamw.mu) == set(AXES) - muon


def test_an_expert_without_a_gradient_is_only_decayed():
    grads = _arrays(1)
    grads["body.experts.up"][1, 2] = 0
    params = _arrays(0)
    got, _ = _train(Muon(), params, [grads], rate=0.5)
    before = params["body.experts.up"]
    after = np.asarray(got["body.experts.up"])
    np.testing.assert_allclose(after[1, 2], before[1, 2] * (1 - 0.5 * 0.1), rtol=1e-6)
    assert not np.allclose(after[1, 1], before[1, 1] * (1 - 0.5 * 0.1), rtol=1e-2)


def test_the_iteration_runs_in_bfloat16_where_that_is_fast():
    optimizer = make_optimizer(Muon(), optax.constant_schedule(1.0), INFO)
    state = jax.eval_shape(optimizer.init, _arrays(0))
    traced = jax.jit(optimizer.update).trace(_arrays(1), state, _arrays(0))
    cpu, tpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu"))
    assert "bf16" not in cpu
    assert "bf16" in tpu


@pytest.mark.parametrize(
    "config",
    [MeshConfig(fsdp=2, expert=2, tensor=2), MeshConfig(fsdp=4, tensor=2, explicit=False)],
    ids=["explicit", "auto"],
)
def test_sharded_muon_equals_one_device_and_keeps_its_layout(config):
    params, gradients = _arrays(0), [_arrays(1), _arrays(2)]
    alone, _ = _train(Muon(), params, gradients, rate=0.05)
    mesh = make_mesh(config)
    places = {n: NamedSharding(mesh, AxisRules().param_spec(axes)) for n, axes in AXES.items()}

    def put(tree):
        return {n: jax.device_put(x, places[n]) for n, x in tree.items()}

    with use_mesh(mesh):
        sharded, state = _train(Muon(), put(params), [put(g) for g in gradients], rate=0.05)
    for name, x in sharded.items():
        np.testing.assert_allclose(x, np.asarray(alone[name]), atol=2e-6, err_msg=name)
    for name, x in state.muon.momentum.items():
        assert x.sharding.is_equivalent_to(places[name], x.ndim), name


def test_devices_share_matrices_out_where_their_number_allows():
    experts, dense = as_matrix(AXES["body.experts.up"]), as_matrix(AXES["head.gate_proj.kernel"])
    with use_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        # 8 experts over 8 devices.
        assert _route(experts, (2, 8, 8, 4))[-1] == P(
            None, ("expert", "tensor", "fsdp"), None, None
        )
        # Of 2 layers of 2 experts, the layers take what the experts cannot; fsdp is gathered.
        assert _route(experts, (2, 2, 8, 4))[-1] == P("tensor", "expert", None, None)
        # A matrix alone is gathered.
        assert _route(dense, (8, 4))[-1] == P(None, None)


@pytest.mark.parametrize(
    ("axes", "batch", "rows"),
    [
        (("embed", "heads", "head_dim"), 0, 1),
        (("heads", "head_dim", "embed"), 0, 2),
        (("layers", "latent", "kv_heads", "head_dim"), 1, 1),
        (("layers", "experts", "embed", "mlp"), 2, 1),
        (("embed", "experts"), 0, 1),
        (("experts", "embed"), 0, 1),
        (("embed", "heads"), 0, 1),
    ],
)
def test_heads_merge_and_layers_and_experts_count(axes, batch, rows):
    assert as_matrix(axes) == Matrix(axes, batch, rows)


@pytest.mark.parametrize(
    "axes", [("embed",), ("heads", "head_dim"), ("layers", "embed"), (None, None, "embed", "mlp")]
)
def test_what_has_no_two_sides_is_no_matrix(axes):
    assert as_matrix(axes) is None


_PROJECTIONS = ("q", "k", "v", "o", "b", "f_a", "f_b", "g_a", "g_b", "kv_a", "kv_b")


def _last(name):
    """A parameter's kind: what is left of its path without indices."""
    return re.sub(r"^stack\.(head|body|tail)\.\d+\.", "", name)


def test_kimi_linear_splits_as_published():
    config = get_experiment("tiny").model
    graphdef, shapes, _ = abstract(lambda key: build_model(config, key))
    info = param_info(nnx.merge(graphdef, shapes))
    muon = {_last(n) for n in matrices(info)}
    mixers = {f"mixer.{p}_proj.kernel" for p in _PROJECTIONS}
    dense = {f"ffn.{p}_proj.kernel" for p in ("gate", "up", "down")}
    shared = {f"ffn.shared.{p}_proj.kernel" for p in ("gate", "up", "down")}
    experts = {f"ffn.experts.{p}" for p in ("gate", "up", "down")}
    assert muon == mixers | dense | shared | experts | {"ffn.router.kernel"}
    rest = {_last(n) for n in trainable(info, ".*")} - muon
    assert rest == {
        "embed.embedding",
        "lm_head.kernel",
        "final_norm.scale",
        "input_norm.scale",
        "post_norm.scale",
        "mixer.o_norm.scale",
        "mixer.kv_a_norm.scale",
        "mixer.A_log",
        "mixer.dt_bias",
        "mixer.q_conv",
        "mixer.k_conv",
        "mixer.v_conv",
    }
    assert {_last(n) for n in info} - muon - rest == {"ffn.router.bias"}
    assert {_last(n) for n in info if not decays(n)} == {"mixer.A_log", "mixer.dt_bias"}


def test_nothing_to_train_is_an_error():
    with pytest.raises(InputError, match=r"trainable='lora' matches no parameter"):
        make_optimizer(Muon(trainable="lora"), optax.constant_schedule(1.0), INFO)
