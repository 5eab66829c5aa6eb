"""Weight-only int8 on every family: what is kept, how far it is off, and that all else goes on."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxalope
from jaxalope import (
    Greedy,
    InputError,
    LoRAConfig,
    Model,
    dequantize_weights,
    generate,
    merge_lora,
    power_sample,
    quantize_weights,
)
from jaxalope.configs import AdamW, Constant
from jaxalope.configs.registry import get_experiment
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.layers.int8 import Int8, product
from jaxalope.model import (
    Gemma2Config,
    GPTNeoXConfig,
    KimiLinearConfig,
    add_retrofits,
    build_model,
)
from jaxalope.model.int8 import quantize_module
from jaxalope.sharding import (
    AxisRules,
    MeshConfig,
    init_params,
    make_mesh,
    param_axes,
    path_name,
    shardings,
    split,
)
from jaxalope.train.optimizers import flatten
from jaxalope.train.step import init_state, make_train_step

pytestmark = pytest.mark.long

# A dense block of KDA, then a scanned one of MLA and experts.
KIMI = dataclasses.replace(
    KimiLinearConfig.tiny(), num_layers=3, kda_layers=(1,), full_attn_layers=(2, 3)
)
CONFIGS = {"kimi": KIMI, "gemma2": Gemma2Config.tiny(), "neox": GPTNeoXConfig.tiny()}
KEY = jax.random.key(7)


def flat(params):
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def ids(rows=2, length=12):
    return np.random.default_rng(3).integers(0, 320, (rows, length)).astype(np.int32)


def num_bytes(model):
    return sum(x.nbytes for x in jax.tree.leaves(model.params))


def off(a, b):
    """The root mean square of the difference, relative to that of ``b``."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@pytest.fixture(scope="module")
def models():
    made = {}
    for name, config in CONFIGS.items():
        graphdef, params = init_params(lambda key, c=config: build_model(c, key), jax.random.key(0))
        params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
        made[name] = Model(config, graphdef, params, load_tokenizer("bytes"))
    return made


@pytest.fixture(scope="module")
def quantized(models):
    return {name: quantize_weights(model) for name, model in models.items()}


def on(model, mesh):
    places = shardings(model.params, param_axes(model.module()), mesh, AxisRules())
    return dataclasses.replace(model, params=jax.device_put(model.params, places), mesh=mesh)


# -------------------------------------------------------------------------------- what is int8


@pytest.mark.parametrize("name", CONFIGS)
def test_maps_and_experts_of_the_blocks_are_int8_and_all_else_is_shared(name, models, quantized):
    ours, theirs = flat(quantized[name].params), flat(models[name].params)
    int8 = {n for n, x in ours.items() if x.dtype == jnp.int8}
    wanted = r"stack\..*_proj\.kernel|stack\..*\.experts\.(gate|up|down)"
    assert int8 == {n for n in theirs if re.fullmatch(wanted, n)}
    assert ours.keys() == theirs.keys() | {f"{n}_scale" for n in int8}
    assert all(ours[n] is theirs[n] for n in theirs.keys() - int8)
    assert all(ours[n].shape == theirs[n].shape for n in int8)
    axes = {
        path_name(path): a
        for path, a in jax.tree.leaves_with_path(
            param_axes(quantized[name].module()), is_leaf=lambda x: isinstance(x, tuple)
        )
    }
    for n in int8:
        scale = ours[f"{n}_scale"]
        assert scale.dtype == jnp.float32 and scale.ndim == len(axes[f"{n}_scale"])
        for size, wide, a, b in zip(
            scale.shape, ours[n].shape, axes[f"{n}_scale"], axes[n], strict=True
        ):
            assert (size, a) in ((1, None), (wide, b))
    assert sum(ours[n].nbytes for n in int8) * 4 == sum(theirs[n].nbytes for n in int8)
    assert num_bytes(quantized[name]) < num_bytes(models[name])


@pytest.mark.parametrize("tile_size", [None, 4])
def test_each_weight_is_off_by_half_a_step_of_its_own_scale(models, tile_size):
    model = quantize_weights(models["kimi"], tile_size=tile_size)
    ours, theirs = flat(model.params), flat(models["kimi"].params)
    back = flat(dequantize_weights(model).params)
    assert back.keys() == theirs.keys()
    for n, w in theirs.items():
        if n + "_scale" not in ours:
            continue
        scale = ours[n + "_scale"]
        for axis, size in enumerate(w.shape):
            scale = jnp.repeat(scale, size // scale.shape[axis], axis)
        error = np.abs(back[n] - w)
        assert np.all(error <= 0.5001 * scale) and error.max() > 0
        # The largest of a column decides its scale.
        assert np.all(np.abs(ours[n]).max(-2) <= 127)
        assert np.abs(ours[n]).max() >= 126


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_near_and_nearer_with_tiles(name, models):
    # As initialised: larger random weights make a chaos of any difference.
    model = models[name]
    model = dataclasses.replace(
        model, params=jax.tree.map(lambda x: x / 4 if x.ndim > 1 else x, model.params)
    )
    wanted = model(ids(8))[0]
    whole = off(quantize_weights(model)(ids(8))[0], wanted)
    tiled = off(quantize_weights(model, tile_size=4)(ids(8))[0], wanted)
    assert 0 < tiled < whole < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (4, 8)])
def test_the_product_scales_outputs_or_tiles(shape, dtype):
    x = jax.random.normal(KEY, (2, 3, 8)).astype(dtype)
    values = jax.random.randint(KEY, (8, 8), -127, 128, jnp.int8)
    scale = jax.random.uniform(KEY, shape, minval=0.5, maxval=2.0) / 127
    weight = np.asarray(values, np.float64) * np.repeat(np.asarray(scale), 8 // shape[0], 0)
    y = product(x, Int8(values, scale), ("batch", "seq", "mlp"))
    assert y.dtype == x.dtype
    wanted = np.asarray(x, np.float64) @ weight
    np.testing.assert_allclose(
        np.asarray(y, np.float64), wanted, atol=1e-5 if dtype == "float32" else 0.06
    )


def test_targets_choose(models):
    model = quantize_weights(models["neox"], targets=("lm_head", r"mixer\.o_proj"))
    names = {n for n, x in flat(model.params).items() if x.dtype == jnp.int8}
    assert names == {"lm_head.kernel", "stack.body.0.mixer.o_proj.kernel"}
    assert model(ids())[0].dtype == jnp.float32
    assert 0 < off(model(ids())[0], models["neox"](ids())[0]) < 0.02
    more = quantize_weights(model, targets=("ffn",))
    assert sum(x.dtype == jnp.int8 for x in flat(more.params).values()) == 4


# --------------------------------------------------------------------------------- all goes on


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_model_of_its_dequantized_weights_in_every_way_to_run(name, quantized):
    """One pass, a prefill, single tokens, layers apart; experts sliced or grouped."""
    model, tokens = quantized[name], ids()
    close = {"atol": 3e-4, "rtol": 3e-4}
    logits = np.asarray(dequantize_weights(model)(tokens)[0])
    np.testing.assert_allclose(model(tokens)[0], logits, **close)
    np.testing.assert_allclose(model.unrolled()(tokens)[0], logits, **close)
    out, cache = model(tokens[:, :9], model.init_cache(2, 16))
    np.testing.assert_allclose(out, logits[:, :9], **close)
    for i in range(9, 12):
        out, cache = model(tokens[:, i : i + 1], cache)
        np.testing.assert_allclose(out[:, 0], logits[:, i], **close)


def test_it_generates_and_samples(quantized):
    model, prompts = quantized["neox"], ["def f", "x"]
    wide = dequantize_weights(model)
    ours, theirs = (
        generate(m, prompts, policy=Greedy(), max_new_tokens=6).tokens for m in (model, wide)
    )
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    settings = {"alpha": 2.0, "t_max": 4, "block": 2, "n_mcmc": 1}
    ours, theirs = (power_sample(m, prompts[:1], **settings) for m in (model, wide))
    np.testing.assert_array_equal(ours.tokens[0], theirs.tokens[0])


@pytest.mark.parametrize(
    ("name", "axes", "tile_size", "explicit"),
    [
        ("kimi", {"expert": 2, "tensor": 2}, 4, True),
        ("kimi", {"fsdp": 2, "tensor": 2}, 4, False),
        ("kimi", {"expert": 2, "fsdp": 2}, None, True),
        ("neox", {"fsdp": 2, "tensor": 2}, 4, True),
        ("neox", {"fsdp": 2, "tensor": 2}, None, False),
    ],
)
def test_sharded_equals_one_device(name, axes, tile_size, explicit, models):
    mesh = make_mesh(MeshConfig(data=2, **axes, explicit=explicit))
    alone = quantize_weights(models[name], tile_size=tile_size)
    model = quantize_weights(on(models[name], mesh), tile_size=tile_size)
    ours, theirs = flat(model.params), flat(alone.params)
    assert all(np.array_equal(ours[n], x) for n, x in theirs.items())
    split_in = ours["stack.body.0.mixer.o_proj.kernel"]
    assert split_in.sharding.shard_shape(split_in.shape) != split_in.shape
    np.testing.assert_allclose(model(ids(4))[0], alone(ids(4))[0], atol=2e-4, rtol=2e-4)


def test_it_is_saved_and_loaded_as_it_is(quantized, tmp_path):
    model = quantized["neox"]
    jaxalope.save(model, tmp_path / "run", format="orbax")
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    for settings in ({}, {"mesh": mesh}, {"param_dtype": "bfloat16"}):
        back = jaxalope.load(tmp_path / "run", **settings)
        assert back.graphdef == model.graphdef
        for n, x in flat(back.params).items():
            kept = "param_dtype" not in settings or x.dtype == jnp.int8 or n.endswith("_scale")
            theirs = flat(model.params)[n]
            assert np.array_equal(x, theirs) if kept else x.dtype == jnp.bfloat16
    jaxalope.save(model, tmp_path / "half", format="orbax", dtype="bfloat16")
    half = flat(jaxalope.load(tmp_path / "half").params)
    assert {str(x.dtype) for x in half.values()} == {"bfloat16", "int8", "float32"}
    assert all(np.array_equal(x, flat(model.params)[n]) for n, x in half.items() if "proj.k" in n)
    with pytest.raises(InputError, match=r"no name for .*kernel_scale"):
        jaxalope.save(model, tmp_path / "hf")
    jaxalope.save(dequantize_weights(model), tmp_path / "hf")
    again = jaxalope.load(tmp_path / "hf")
    np.testing.assert_allclose(again(ids())[0], model(ids())[0], atol=1e-4)


# --------------------------------------------------------------------------------------- QLoRA


def test_adapters_on_an_int8_base_are_trained_and_the_base_is_not():
    demo = get_experiment("lora_demo")
    experiment = dataclasses.replace(
        demo,
        init_from=None,
        model=CONFIGS["neox"],
        data=dataclasses.replace(demo.data, sequence_length=16, batch_size=4),
        optimizer=AdamW(trainable=LoRAConfig.trainable),
        schedule=Constant(learning_rate=1e-2, warmup_steps=0),
    )

    def quantized(key):
        return quantize_module(build_model(experiment.model, key))

    graphdef, state = init_state(experiment, build=quantized)
    before = jax.device_get(flatten(state.params))
    assert before["stack.body.0.mixer.q_proj.kernel"].dtype == np.int8
    assert all("lora" in n for n in state.opt_state.adamw.mu)
    step, losses = make_train_step(experiment, graphdef), []
    tokens = ids(4, 17)
    batch = {
        "tokens": tokens[:, :-1],
        "segment_ids": np.ones((4, 16), np.int32),
        "positions": np.tile(np.arange(16, dtype=np.int32), (4, 1)),
    }
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    after = jax.device_get(flatten(state.params))
    changed = {n for n in after if after[n].tobytes() != before[n].tobytes()}
    assert changed == {n for n in after if "lora" in n}
    assert losses[-1] < losses[0] - 0.01


def test_adapters_on_int8_are_not_merged_but_carry_over(models, quantized):
    model = add_retrofits(quantized["neox"], [LoRAConfig()], KEY)
    np.testing.assert_allclose(model(ids())[0], quantized["neox"](ids())[0], atol=1e-5)
    with pytest.raises(InputError, match=r"_proj is int8, which cannot hold the sum"):
        merge_lora(quantize_weights(add_retrofits(models["neox"], [LoRAConfig()], KEY)))
    merged = merge_lora(dequantize_weights(model))
    np.testing.assert_allclose(merged(ids())[0], model(ids())[0], atol=1e-4)


# --------------------------------------------------------------------------------------- errors


def test_without_qwix_the_command_is_told(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match=r"pip install 'jaxalope\[quant\]'"):
        quantize_weights(models["neox"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4}, "bits=4 is not supported; use 8"),
        ({"targets": ("norm",)}, "'norm' is found in no weight's path"),
        ({"targets": "ffn"}, "targets='ffn' must be a list of regular expressions"),
        ({"tile_size": 5}, r"tile_size=5 does not divide the \d+ inputs of stack\.body"),
        ({"tile_size": 0}, "tile_size=0 does not divide"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message, models):
    with pytest.raises(InputError, match=message):
        quantize_weights(models["neox"], **settings)


def test_twice_is_refused_and_so_is_dequantizing_what_is_not(models, quantized):
    with pytest.raises(InputError, match="is int8 already; quantize a model once"):
        quantize_weights(quantized["neox"])
    with pytest.raises(InputError, match="no weight of the model is int8"):
        dequantize_weights(models["neox"])
    with pytest.raises(InputError, match="this model has no stack"):
        quantize_module(nnx.merge(*split(models["neox"].module().lm_head)))
