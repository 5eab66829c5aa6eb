"""Adapters in PEFT's files: PEFT on transformers computes what we do, both ways."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxalope
from jaxalope import LoRAConfig, Model, load_lora, save_lora
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
