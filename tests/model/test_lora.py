"""LoRA on every family: what adapters add, what they leave alone, and how they are folded in."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxalope
from jaxalope import Greedy, InputError, LoRAConfig, Model, generate, load_lora, merge_lora
from jaxalope.configs import AdamW, Constant
from jaxalope.configs.registry import get_experiment
from jaxalope.model import (
    Gemma2Config,
    GPTNeoXConfig,
    KimiLinearConfig,
    add_decoding_heads,
    add_retrofits,
    build_model,
    save_lora,
)
from jaxalope.model.exchange.files import encode_header, write_file
from jaxalope.model.lora import adapted
from jaxalope.model.published import published_tensors
from jaxalope.model.retrofit import attached, build
from jaxalope.sharding import (
    AxisRules,
    MeshConfig,
    abstract,
    init_params,
    make_mesh,
    param_axes,
    path_name,
    shardings,
)
from jaxalope.train.loop import train
from jaxalope.train.optimizers import matches

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


@pytest.fixture(scope="module")
def models():
    """A model of each configuration, with weights large enough for each map to matter."""
    made = {}
    for name, config in CONFIGS.items():
        graphdef, params = init_params(lambda key, c=config: build_model(c, key), jax.random.key(0))
        params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
        made[name] = Model(config, graphdef, params)
    return made


def trained(model, **settings):
    """The model with adapters whose ``b`` is no longer zero."""
    model = add_retrofits(model, [LoRAConfig(**settings)], KEY)

    def noise(path, x):
        if not path_name(path).endswith("lora.b"):
            return x
        return jax.device_put(0.05 * jax.random.normal(KEY, x.shape), x.sharding)

    return dataclasses.replace(model, params=jax.tree.map_with_path(noise, model.params))


def on(model, mesh):
    axes = param_axes(model.module())
    places = shardings(model.params, axes, mesh, AxisRules())
    return dataclasses.replace(model, params=jax.device_put(model.params, places), mesh=mesh)


# ----------------------------------------------------------------------------------- what is added


@pytest.mark.parametrize("name", CONFIGS)
def test_every_projection_of_any_family_has_an_adapter_and_nothing_else_changes(name):
    config = CONFIGS[name]
    _, base, _ = abstract(lambda key: build(config, [], key))
    _, shapes, axes = abstract(lambda key: build(config, [LoRAConfig(rank=3)], key))
    base, shapes = flat(base), flat(shapes)
    axes = {path_name(p): a for p, a in jax.tree.leaves_with_path(axes, is_leaf=_is_axes)}
    assert base.items() <= shapes.items()
    adapted = [n for n in base if n.endswith("_proj.kernel")]
    maps = [n.removesuffix(".kernel") for n in adapted]
    assert shapes.keys() - base.keys() == {f"{n}.lora.{x}" for n in maps for x in "ab"}
    assert any(n.startswith("stack.body") for n in maps)
    for n in maps:
        kernel, a, b = (shapes[f"{n}.{x}"].shape for x in ("kernel", "lora.a", "lora.b"))
        stacked = axes[f"{n}.kernel"].count("layers")
        inner = len(a) - 1
        assert kernel == a[:-1] + b[stacked + 1 :] and a[-1] == b[stacked] == 3
        assert axes[f"{n}.lora.a"] == (*axes[f"{n}.kernel"][:inner], None)
        rest = (*axes[f"{n}.kernel"][:stacked], None, *axes[f"{n}.kernel"][inner:])
        assert axes[f"{n}.lora.b"] == rest
        assert matches(LoRAConfig.trainable, f"{n}.lora.a")
    assert not any(matches(LoRAConfig.trainable, n) for n in base)


def _is_axes(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_adapter_adds_zeros_and_shares_the_base(name, models):
    model = models[name]
    fresh = add_retrofits(model, [LoRAConfig()], KEY)
    assert attached(fresh.module()) == ("lora",)
    # The compiler may round another program otherwise: each map to the bit, all of them nearly.
    for path, linear in adapted(nnx.merge(fresh.graphdef, _first(fresh.params))).items():
        x = jnp.ones((1, 2, *linear.kernel.shape[: linear.kernel[...].ndim - len(linear.out_axes)]))
        y = linear(x)
        del linear.lora
        np.testing.assert_array_equal(y, linear(x), err_msg=path)
    np.testing.assert_allclose(fresh(ids())[0], model(ids())[0], atol=1e-5)
    ours, theirs = flat(fresh.params), flat(model.params)
    assert all(ours[n] is x for n, x in theirs.items())
    assert all(np.ptp(x) > 0 for n, x in ours.items() if n.endswith("lora.a"))


def _first(params):
    """Parameters whose scanned blocks are the first repeat alone."""
    body = jax.tree.map(lambda x: x[0], params["stack"]["body"])
    return params | {"stack": params["stack"] | {"body": body}}


def test_targets_choose_and_an_adapter_is_drawn_for_its_own_path(models):
    few = flat(add_retrofits(models["neox"], [LoRAConfig(targets=("mixer.o_proj",))], KEY).params)
    many = flat(add_retrofits(models["neox"], [LoRAConfig()], KEY).params)
    assert [n for n in few if "lora" in n] == [
        "stack.body.0.mixer.o_proj.lora.a",
        "stack.body.0.mixer.o_proj.lora.b",
    ]
    assert all(np.array_equal(few[n], many[n]) for n in few)
    head = add_retrofits(models["neox"], [LoRAConfig(targets=("lm_head",), rank=2)], KEY)
    assert head.params["lm_head"]["lora"]["b"].shape == (2, 320)


def test_beside_another_retrofit(models):
    model = add_decoding_heads(trained(models["neox"]), KEY, width=4)
    assert attached(model.module()) == ("lora", "decoding_heads")
    merged = merge_lora(model)
    assert attached(merged.module()) == ("decoding_heads",)
    assert "decoding_heads" in merged.params


# ---------------------------------------------------------------------------------- what they do


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_equals_adapted_in_every_way_to_run(name, models):
    """One pass, a prefill, single tokens (where MLA's expanding map is read as a matrix), apart."""
    model, tokens = trained(models[name]), ids()
    logits = np.asarray(model(tokens)[0])
    assert np.abs(logits - models[name](tokens)[0]).max() > 0.1
    merged = merge_lora(model)
    assert merged.graphdef == models[name].graphdef
    close = {"atol": 2e-4, "rtol": 2e-4}
    np.testing.assert_allclose(merged(tokens)[0], logits, **close)
    np.testing.assert_allclose(model.unrolled()(tokens)[0], logits, **close)
    ours, theirs = flat(merged.params), flat(models[name].params)
    changed = {n for n in ours if ours[n] is not theirs[n]}
    assert changed == {n for n in ours if n.endswith("_proj.kernel")}
    out, cache = model(tokens[:, :9], model.init_cache(2, 16))
    np.testing.assert_allclose(out, logits[:, :9], **close)
    for i in range(9, 12):
        out, cache = model(tokens[:, i : i + 1], cache)
        np.testing.assert_allclose(out[:, 0], logits[:, i], **close)


@pytest.mark.parametrize(
    ("name", "axes", "explicit"),
    [
        ("kimi", {"expert": 2, "tensor": 2}, True),
        ("neox", {"fsdp": 2, "tensor": 2}, True),
        ("neox", {"fsdp": 2, "tensor": 2}, False),
    ],
)
def test_sharded_equals_one_device(name, axes, explicit, models):
    mesh = make_mesh(MeshConfig(data=2, **axes, explicit=explicit))
    model, tokens = trained(models[name]), ids(4)
    sharded = trained(on(models[name], mesh))
    a = sharded.params["stack"]["body"][0]["mixer"]["o_proj"]["lora"]["a"]
    assert a.sharding.shard_shape(a.shape)[1] == a.shape[1] // 2
    np.testing.assert_allclose(sharded(tokens)[0], model(tokens)[0], atol=1e-4, rtol=1e-4)
    merged, alone = merge_lora(sharded), merge_lora(model)
    for n, x in flat(alone.params).items():
        np.testing.assert_allclose(flat(merged.params)[n], x, atol=1e-5)
        assert flat(merged.params)[n].sharding == flat(sharded.params)[n].sharding


# ------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``(base workdir, workdir)`` of a short run and of one that trained adapters on it."""
    demo = get_experiment("lora_demo")
    base = dataclasses.replace(
        demo,
        init_from=None,
        retrofits=(),
        optimizer=AdamW(),
        # Has a router, whose bias is learnt without a gradient.
        model=dataclasses.replace(
            KIMI, num_layers=2, kda_layers=(), full_attn_layers=(1, 2), first_k_dense_replace=0
        ),
        data=dataclasses.replace(demo.data, sequence_length=16, batch_size=4),
        train=dataclasses.replace(demo.train, steps=2, log_every=1, eval_every=None),
        schedule=Constant(learning_rate=1e-3, warmup_steps=0),
    )
    here, there = (tmp_path_factory.mktemp(name) for name in ("base", "lora"))
    train(base, here, devices=jax.devices()[:1], quiet=True)
    adapted = dataclasses.replace(
        base, init_from=str(here), retrofits=demo.retrofits, optimizer=demo.optimizer
    )
    train(adapted, there, devices=jax.devices()[:1], quiet=True)
    return here, there


def test_training_leaves_the_base_byte_identical_and_moves_every_adapter(run):
    base, model = (jaxalope.load(path) for path in run)
    ours, theirs = flat(model.params), flat(base.params)
    assert all(ours[n].tobytes() == x.tobytes() for n, x in _bytes(theirs).items())
    new = ours.keys() - theirs.keys()
    assert new and all(np.abs(ours[n]).max() > 0 for n in new)
    assert np.abs(model(ids())[0] - base(ids())[0]).max() > 1e-3
    with pytest.raises(InputError, match="has lora already"):
        add_retrofits(model, [LoRAConfig()], KEY)


def _bytes(arrays):
    return {n: np.asarray(x) for n, x in arrays.items()}


def test_a_merged_run_is_saved_and_loaded_and_decodes_the_same(run, tmp_path):
    model = jaxalope.load(run[1])
    jaxalope.save(merge_lora(model), tmp_path / "merged")
    again = jaxalope.load(tmp_path / "merged")
    assert attached(again.module()) == ()
    np.testing.assert_allclose(again(ids())[0], model(ids())[0], atol=1e-5)
    with pytest.raises(InputError, match=r"no name for .*lora\.a"):
        jaxalope.save(model, tmp_path / "adapted")
    jaxalope.save(model, tmp_path / "workdir", format="orbax")
    back = jaxalope.load(tmp_path / "workdir")
    assert back.graphdef == model.graphdef
    texts = [generate(m, ["def f"], policy=Greedy(), max_new_tokens=4) for m in (model, back)]
    np.testing.assert_array_equal(texts[0].tokens[0], texts[1].tokens[0])


# --------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize(
    ("name", "targets"), [("kimi", (r"_proj$",)), ("neox", (r"o_proj", r"ffn\..*_proj"))]
)
def test_peft_files_say_what_the_merged_model_says(name, targets, models, tmp_path):
    """``W + alpha / r * B @ A``, in published names and layouts, is the merged model's ``W``."""
    model = trained(models[name], rank=3, alpha=5.0, targets=targets)
    save_lora(model, tmp_path, base="organisation/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 5.0 and config["peft_type"] == "LORA"
    files = load_file(tmp_path / "adapter_model.safetensors")
    base, merged = published_tensors(models[name]), published_tensors(merge_lora(model))
    changed = {n for n in base if not np.array_equal(base[n], merged[n])}
    assert {f"{n}.weight" for n in config["target_modules"]} == changed
    assert len(files) == 2 * len(changed)
    for n in changed:
        a, b = (files[f"base_model.model.{n[:-7]}.lora_{x}.weight"] for x in "AB")
        assert a.shape == (3, base[n].shape[1]) and b.shape == (base[n].shape[0], 3)
        np.testing.assert_allclose(base[n] + 5 / 3 * b @ a, merged[n], atol=1e-5)
    back = load_lora(models[name], tmp_path)
    np.testing.assert_array_equal(back(ids())[0], model(ids())[0])
    theirs = flat(model.params)
    assert all(np.array_equal(x, theirs[n]) for n, x in flat(back.params).items())


def test_a_part_of_a_published_map_is_no_peft_adapter(models, tmp_path):
    with pytest.raises(InputError, match=r"q_proj is a part of .*query_key_value.*merge_lora"):
        save_lora(trained(models["neox"]), tmp_path)
    with pytest.raises(InputError, match="save_lora: the model has no adapters"):
        save_lora(models["neox"], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is another computation"),
        ({"bias": "all"}, "bias='all' is another computation"),
        ({"peft_type": None}, "peft_type=None is another computation"),
        (
            {"lora_bias": True},
            "lora_bias=True is another .*merge the adapter with PEFT",
        ),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\] is another"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication=\[\[0, 2\], .* is another"),
        ({"use_qalora": True}, "use_qalora=True is another"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' is another"),
        (
            {"init_lora_weights": "OLoRA"},
            "init_lora_weights='OLoRA' is another .*merge the adapter",
        ),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' is another"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' is another"),
        ({"r": 4}, "lora_A of .* has shape .* does not fit rank 4"),
        ({"r": None}, "adapter_config.json: r=None must be int"),
        ({"r": 2.0}, "adapter_config.json: r=2.0 must be int"),
        ({"lora_alpha": "16"}, "adapter_config.json: lora_alpha='16' must be float"),
        ("{", "adapter_config.json is no JSON"),
        ("[]", r"adapter_config.json holds \[\] and no JSON object"),
        ("{}", "adapter_config.json has no r"),
        ("rename", "mlp.other.* has no place in this model"),
        ("remove", "there is no adapter_model.safetensors"),
    ],
)
def test_peft_files_that_do_not_fit_are_refused(change, message, models, tmp_path):
    save_lora(trained(models["neox"], targets=("up_proj",)), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    if isinstance(change, dict):
        contents = json.loads(config.read_text()) | change
        if contents["peft_type"] is None:
            del contents["peft_type"]  # A field that is absent is told as None.
        config.write_text(json.dumps(contents))
    elif change[0] in "{[":
        config.write_text(change)
    elif change == "rename":
        tensors = load_file(weights)
        save_file({n.replace("dense_h_to_4h", "other"): x for n, x in tensors.items()}, weights)
    else:
        pathlib.Path(weights).unlink()
    with pytest.raises(InputError, match=message):
        load_lora(models["neox"], tmp_path)


@pytest.mark.parametrize("draw", [True, False, "gaussian", "eva", "mica", "orthogonal"])
def test_peft_files_whose_draw_left_the_base_alone_are_read(draw, models, tmp_path):
    model = trained(models["neox"], targets=("up_proj",))
    save_lora(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    off = {"lora_bias": False, "layer_replication": None, "target_parameters": []}
    contents = json.loads(config.read_text()) | off | {"init_lora_weights": draw}
    config.write_text(json.dumps(contents))
    back = load_lora(models["neox"], tmp_path)
    theirs = flat(model.params)
    assert all(np.array_equal(x, theirs[n]) for n, x in flat(back.params).items())


def test_peft_files_in_bfloat16_are_read(models, tmp_path):
    """As PEFT saves the adapters of a model in bfloat16, which most are."""
    model = trained(models["neox"], targets=("up_proj",))
    save_lora(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in load_file(weights).items()}
    forms = {n: (x.dtype, x.shape) for n, x in tensors.items()}
    write_file(epath.Path(weights), encode_header(forms), tensors.values())
    back, theirs = flat(load_lora(models["neox"], tmp_path).params), flat(model.params)
    for n in (n for n in back if "lora" in n):
        rounded = np.asarray(theirs[n]).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(back[n], rounded)
        assert back[n].dtype == jnp.float32


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "retrofits.rank=0 must be 1 or more"),
        ({"alpha": 0.0}, "retrofits.alpha=0.0 must be above 0"),
        ({"targets": ()}, r"retrofits.targets=\(\) must be a list of regular expressions"),
        ({"targets": ("(",)}, r"retrofits.targets: '\(' is no regular expression"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        LoRAConfig(**settings)


def test_targets_that_nothing_matches_are_told_with_names_that_exist(models):
    with pytest.raises(InputError, match=r"'q_prj' is found in no weight's path.*lm_head"):
        add_retrofits(models["neox"], [LoRAConfig(targets=("o_proj", "q_prj"))], KEY)
    with pytest.raises(InputError, match="merge_lora: the model has no adapters"):
        merge_lora(models["neox"])


def test_a_large_rank_and_bfloat16_are_no_special_cases(models):
    config = dataclasses.replace(CONFIGS["neox"], dtype="bfloat16")
    graphdef, params = init_params(
        lambda key: build(config, [LoRAConfig(rank=64)], key), jax.random.key(0)
    )
    model = Model(config, graphdef, params)
    logits = model(ids())[0]
    assert logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())
