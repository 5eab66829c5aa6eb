"""Adapters in PEFT's files: PEFT on transformers computes what we do, both ways."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxalope
from jaxalope import InputError, LoRAConfig, Model, load_lora, save_lora
from jaxalope.model import Gemma2Config, GPTNeoXConfig, add_retrofits, build_model
from jaxalope.sharding import init_params, path_name

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("config", "targets"),
    [(GPTNeoXConfig.tiny(), ("o_proj", "ffn")), (Gemma2Config.tiny(), ("_proj$",))],
    ids=["gpt_neox", "gemma2"],
)
def test_peft_agrees_on_our_adapters_and_we_on_its(config, targets, tmp_path):
    graphdef, params = init_params(lambda key: build_model(config, key), KEY)
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    base = Model(config, graphdef, params)
    model = add_retrofits(base, [LoRAConfig(rank=3, alpha=5.0, targets=targets)], KEY)

    def trained(path, x):
        fresh = path_name(path).endswith("lora.b")
        return 0.05 * jax.random.normal(KEY, x.shape) if fresh else x

    model = dataclasses.replace(model, params=jax.tree.map_with_path(trained, model.params))
    jaxalope.save(base, tmp_path / "base")
    save_lora(model, tmp_path / "adapter")
    ids = np.random.default_rng(0).integers(0, 320, (2, 12))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits - base(ids)[0]).max() > 0.1
    np.testing.assert_allclose(model(ids)[0], logits, atol=1e-4)
    theirs.save_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(load_lora(base, tmp_path / "back")(ids)[0], model(ids)[0])


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """``(our model, new())``: ``new()`` is the same one in transformers."""
    graphdef, params = init_params(lambda key: build_model(GPTNeoXConfig.tiny(), key), KEY)
    model = Model(GPTNeoXConfig.tiny(), graphdef, params)
    path = tmp_path_factory.mktemp("neox") / "base"
    jaxalope.save(model, path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return model, lambda: load(path, dtype=torch.float32, attn_implementation="eager")


def adapter_of_peft(base, **options):
    return peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["dense_h_to_4h"], **options)
    )


@pytest.mark.parametrize("draw", [True, False, "gaussian", "orthogonal", "pissa", "olora"])
def test_a_draw_that_changes_the_base_in_peft_is_refused_and_no_other(draw, neox, tmp_path):
    model, new = neox
    adapter = adapter_of_peft(new(), init_lora_weights=draw)
    adapter.save_pretrained(tmp_path)
    ours = new().state_dict()["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    theirs = adapter.state_dict()
    name = "base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h.base_layer.weight"
    if torch.equal(ours, theirs[name]):
        load_lora(model, tmp_path)
    else:
        with pytest.raises(InputError, match=f"init_lora_weights='{draw}' is another computation"):
            load_lora(model, tmp_path)
    assert torch.equal(ours, theirs[name]) == (draw not in ("pissa", "olora"))


def test_adapters_that_peft_saved_in_bfloat16(neox, tmp_path):
    model, new = neox
    theirs = adapter_of_peft(new(), init_lora_weights=False)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 320, (2, 12))
    theirs = peft.PeftModel.from_pretrained(new(), tmp_path).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    found = load_lora(model, tmp_path)(ids)[0]
    np.testing.assert_allclose(found, logits, atol=1e-4)
    assert np.abs(logits - model(ids)[0]).max() > 1e-3
