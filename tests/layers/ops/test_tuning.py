"""The table of tuned choices: what is in it, who obeys it, and what happens where it cannot be."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import lowered

from jaxalope import InputError
from jaxalope.layers.ops import kda as kda_module
from jaxalope.layers.ops import tuning
from jaxalope.layers.ops.grouped_matmul import grouped_matmul, grouped_swiglu
from jaxalope.layers.ops.kda import kda, l2norm, pallas_gpu
from jaxalope.layers.ops.kda.pallas_gpu import kda_pallas_gpu
from jaxalope.layers.ops.kda.pallas_tpu import kda_pallas_tpu
from jaxalope.layers.ops.latent_decode import latent_decode
from jaxalope.layers.ops.linear_cross_entropy import linear_cross_entropy
from jaxalope.layers.ops.platform import only_on


def kda_inputs(length=64, dtype=jnp.float32, width=16):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (1, length, 2, width)) for key in keys[:3])
    g = -jax.random.uniform(keys[3], (1, length, 2, width))
    beta = jax.random.uniform(keys[4], (1, length, 2))
    return l2norm(q).astype(dtype), l2norm(k).astype(dtype), v.astype(dtype), g, beta


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of its own, in force: ``table({operator: {kind: {class: entry}}})``."""
    monkeypatch.setattr(tuning, "PATH", tmp_path / "tuning.json")
    tuning._committed.cache_clear()

    def write(entries):
        tuning.PATH.write_text(json.dumps(entries))
        tuning._committed.cache_clear()

    yield write
    monkeypatch.undo()
    tuning._committed.cache_clear()


def test_the_committed_table_is_valid_and_packaged():
    assert isinstance(tuning.read(), dict)
    pyproject = pathlib.Path(tuning.__file__).parents[2] / "pyproject.toml"
    assert '"jaxalope.layers.ops" = ["tuning.json"]' in pyproject.read_text()


def test_choices_are_of_the_device_that_is_traced_for(table):
    table({"kda": {"cpu": {"k16 v16": {"chunk_size": 32}}, "TPU v9": {"k16 v16": {"heads": 4}}}})
    assert tuning.chosen("kda", "k16 v16") == {"chunk_size": 32}
    assert tuning.chosen("kda", "k32 v16") == {}
    assert tuning.chosen("grouped_matmul", "e8 256") == {}
    chip = (
        jax.sharding.AbstractMesh(
            (), (), abstract_device=jax.sharding.AbstractDevice("TPU v9", 1, "tpu")
        )
        if hasattr(jax.sharding, "AbstractDevice")
        else None
    )
    if chip is not None:
        with jax.sharding.use_abstract_mesh(chip):
            assert tuning.chosen("kda", "k16 v16") == {"heads": 4}


def test_sizes_change_the_program_and_not_its_results(table):
    """A chunk of KDA, a chunk of tokens of the loss, a block of grouped rows."""
    hidden, kernel = jnp.ones((1, 64, 4)), jnp.ones((4, 8))
    labels = (jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64)))
    x, w = jnp.ones((200, 4)), jnp.ones((2, 4, 8))
    sizes = jnp.array([150, 50], jnp.int32)
    calls = {
        "kda": (kda, kda_inputs()),
        "linear_cross_entropy": (
            lambda *a: linear_cross_entropy(*a)[0],
            (hidden, kernel, *labels),
        ),
        "grouped_matmul": (grouped_matmul, (x, w, sizes)),
    }
    entries = {
        "kda": {"k16 v16": {"chunk_size": 16}},
        "linear_cross_entropy": {"v8": {"chunk_size": 16}},
        "grouped_matmul": {"e2 8": {"block": 16}},
    }
    table({})
    before = {name: (lowered(fn, *args), fn(*args)) for name, (fn, args) in calls.items()}
    table({name: {"cpu": classes} for name, classes in entries.items()})
    for name, (fn, args) in calls.items():
        assert lowered(fn, *args) != before[name][0], name
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            fn(*args),
            before[name][1],
        )


def test_heads_and_tasks_of_a_grid_step_change_the_grid_and_not_the_results():
    """Of the TPU kernel, in interpret mode."""
    arrays = (*kda_inputs(32), jnp.zeros((1, 2, 16, 16)))

    def run(*arrays):
        return kda_pallas_tpu(*arrays, None, scale=0.25, chunk_size=16, interpret=True)

    found = []
    for heads, tasks, grid in ((1, 1, (1, 2, 2)), (1, 2, (1, 2, 1)), (2, 1, (1, 1, 2))):
        with tuning.trying("kda", heads=heads, tasks=tasks):
            traced = jax.jit(lambda *a: run(*a)).trace(*arrays)
        assert f"grid={grid}" in str(traced.jaxpr)
        found.append(traced.lower().compile()(*arrays))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[0], other)


def test_sizes_of_the_gpu_kernels_change_programs_and_not_results():
    """In interpret mode, loss and gradients."""
    arrays = (*kda_inputs(32, width=32), jnp.zeros((1, 2, 32, 32)))

    def loss(*arrays):
        o, state = kda_pallas_gpu(*arrays, None, scale=0.25, chunk_size=16, interpret=True)
        return jnp.sum(o**2) + jnp.sum(state)

    chosen = {"value_block": 32, "key_block": 16, "carry_warps": 8, "transpose_warps": 8}
    plans, found = [], []
    for sizes in ({}, chosen):
        with tuning.trying("kda", **sizes):
            plans.append(pallas_gpu.plan(arrays[0], arrays[2], 0.25, 16, interpret=True))
            found.append(jax.jit(jax.grad(lambda *a: loss(*a), range(6)))(*arrays))
    blocks = [(plan.value_block, plan.key_block) for plan in plans]
    assert blocks == [(16, 32), (32, 16)]
    assert (plans[1].tuning.retreat[0], plans[1].tuning.transpose[0]) == (8, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


def test_an_implementation_is_of_its_own_platform_alone(table):
    x, w = jnp.ones((40, 4)), jnp.ones((2, 4, 8))
    args = (x, w, w, jnp.ones((2, 8, 4)), jnp.array([20, 20], jnp.int32))
    table({"grouped_matmul": {"cpu": {"e2 8": {"implementation": "xla"}}}})
    assert "while" not in lowered(grouped_swiglu, *args)
    assert "ragged_dot" in lowered(grouped_swiglu, *args, platform="tpu")
    table({"grouped_matmul": {"cpu": {"e2 8": {"implementation": "blocked"}}}})
    assert "while" in lowered(grouped_swiglu, *args)
    assert "ragged_dot" in lowered(grouped_swiglu, *args, platform="tpu")


def test_a_gpu_has_the_name_that_code_is_lowered_for(table):
    """JAX calls the platform of its devices "gpu", and that of programs "cuda" or "rocm"."""
    x, w = jnp.ones((40, 4)), jnp.ones((2, 4, 8))
    args = (x, w, w, jnp.ones((2, 8, 4)), jnp.array([20, 20], jnp.int32))
    table({"grouped_matmul": {"NVIDIA H200": {"e2 8": {"implementation": "blocked"}}}})
    for kind, name, loops in (
        ("NVIDIA H200", "cuda", True),
        ("AMD Instinct MI300X", "rocm", False),
    ):
        gpu = jax.sharding.AbstractDevice(kind, None, "gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
        with jax.sharding.use_abstract_mesh(mesh):
            assert tuning.device() == (name, kind)
            found = lowered(lambda *a: grouped_swiglu(*a), *args, platform=name)
        assert ("while" in found) == loops


def test_operators_run_what_the_table_names(table):
    table(
        {
            "kda": {"cpu": {"k16 v16": {"implementation": "reference"}}},
            "latent_decode": {"cpu": {"c8 v6": {"implementation": "reference"}}},
        }
    )
    tokens = kda_inputs()
    assert lowered(kda, *tokens) != lowered(lambda *a: kda(*a, implementation="xla"), *tokens)
    np.testing.assert_allclose(kda(*tokens)[0], kda(*tokens, implementation="xla")[0], atol=1e-5)

    def decode(implementation=None):
        positions = jnp.array([[3, 4]])
        q, latent = jnp.ones((1, 2, 3, 8)), jnp.arange(80.0).reshape(1, 10, 8)
        return latent_decode(
            q, latent, positions=positions, value_dim=6, scale=0.1, implementation=implementation
        )

    np.testing.assert_allclose(decode(), decode("xla"), rtol=1e-5)


def test_what_cannot_take_its_arrays_gives_way_to_the_default(table):
    """The TPU kernel takes no float16; a name given by the user raises, a choice does not."""
    table({"kda": {"cpu": {"k16 v16": {"implementation": "pallas_tpu"}}}})
    tokens = kda_inputs(dtype=jnp.float16)
    with pytest.warns(UserWarning, match="the default is used instead: .*float16"):
        found = kda(*tokens)[0]
    np.testing.assert_array_equal(found, kda(*tokens, implementation="xla")[0])
    with pytest.raises(InputError, match="float16"):
        kda(*tokens, implementation="pallas_tpu")


def test_a_chunk_size_is_of_the_implementation_that_it_was_chosen_for(table):
    """Under None and by name, with a default of the table and with that of the code."""
    named = (None, "xla", "reference", "pallas_tpu", "pallas_gpu")

    def sizes(entry):
        table({"kda": {"cpu": {"k16 v16": entry}}})
        return [kda_module._tuned_chunk_size(name, "k16 v16") for name in named]

    by_schedule = {"by": "schedule", "heads": 4, "pallas_chunk_size": 32}
    assert sizes(by_schedule) == [64, 64, 64, 32, 32]
    assert sizes({"chunk_size": 16}) == [16, 16, 64, 64, 64]
    assert sizes({"implementation": "pallas_tpu", "chunk_size": 16}) == [16, 64, 64, 16, 64]
    both = {"implementation": "xla", "chunk_size": 16, "pallas_chunk_size": 32}
    assert sizes(both) == [16, 16, 64, 32, 32]
    table({"kda": {"cpu": {"k16 v16": by_schedule}}})
    tokens = kda_inputs()
    with_it = lowered(kda, *tokens)
    table({})
    assert with_it == lowered(kda, *tokens)


def test_trying_is_over_when_it_ends():
    with tuning.trying("kda", chunk_size=32):
        assert tuning.chosen("kda", "k7 v7") == {"chunk_size": 32}
        with tuning.trying("kda", heads=1):
            assert tuning.chosen("kda", "k7 v7") == {"heads": 1}
    assert tuning.chosen("kda", "k7 v7") == {}


def test_writing_replaces_some_entries_and_keeps_the_others(table):
    table({"kda": {"TPU v9": {"a": {"heads": 4}}}})
    entry = {"chunk_size": 32, "by": "time", "jax": "1.2.3"}
    tuning.write("kda", "cpu", {"b": entry}, tuning.PATH)
    tuning.write("kda", "TPU v9", {"a": None}, tuning.PATH)
    assert tuning.read(tuning.PATH) == {"kda": {"cpu": {"b": entry}}}
    assert [p.name for p in tuning.PATH.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"conv": {"cpu": {"a": {}}}}, "'conv' is not one of"),
        ({"kda": {"cpu": {"a": {"chunk": 32}}}}, r"kda / cpu / a: 'chunk' is not one of"),
        ({"kda": {"cpu": {"a": {"chunk_size": "32"}}}}, "chunk_size='32' must be a positive int"),
        ({"kda": {"cpu": {"a": {"heads": 0}}}}, "heads=0 must be a positive int"),
        ({"kda": {"cpu": {"a": {"by": "guess"}}}}, "by='guess' must be 'time' or 'schedule'"),
        (
            {"kda": {"cpu": {"a": {"by": "schedule", "implementation": "pallas_tpu"}}}},
            "'implementation' decides what implementation=None runs",
        ),
        (
            {"kda": {"cpu": {"a": {"by": "schedule", "chunk_size": 32}}}},
            "'chunk_size' decides what implementation=None runs",
        ),
    ],
)
def test_a_bad_table_is_named(table, entries, message):
    table(entries)
    with pytest.raises(InputError, match=message):
        tuning.read(tuning.PATH)


def test_a_named_kernel_on_another_platform_is_an_error():
    guard = only_on("tpu", "kernel", "op")
    x = jnp.arange(3.0)
    with pytest.raises(InputError, match='op: implementation="kernel" is being lowered for cpu'):
        jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(guard)(x) ** 2)))(x)
    lowered = jax.jit(lambda x: guard(x) * 2).trace(x).lower(lowering_platforms=("tpu",))
    assert "multiply" in lowered.as_text()
