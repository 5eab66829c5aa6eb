"""Training that begins with a published model."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxalope
from jaxalope import InputError
from jaxalope.configs.overlay import overlay
from jaxalope.configs.registry import get_experiment
from jaxalope.data.tokenizers import ByteTokenizer
from jaxalope.model import Model, build_model
from jaxalope.model.generation_defaults import GenerationDefaults
from jaxalope.sharding import init_params, make_mesh, path_name
from jaxalope.train.loop import train
from jaxalope.train.step import init_state

ONE = jax.devices()[:1]
FAMILIES = ("tiny", "gemma2_tiny", "gpt_neox_tiny", "llada_tiny")


def published(path, experiment, dtype="bfloat16"):
    graphdef, params = init_params(
        lambda key: build_model(experiment.model, key), jax.random.key(11)
    )
    defaults = GenerationDefaults.from_json({"do_sample": True, "temperature": 0.6})
    model = Model(experiment.model, graphdef, params, ByteTokenizer(), defaults=defaults)
    jaxalope.save(model, path, dtype=dtype)
    return model


def flat(tree):
    return {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_float32_copies_on_any_mesh(family, tmp_path):
    experiment = get_experiment(family)
    published(tmp_path / "p", experiment)
    stored = flat(jaxalope.load(tmp_path / "p").params)
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    for settings in ([], ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]):
        begun = overlay(experiment, [*settings, f"init_from={tmp_path / 'p'}"])
        mesh = make_mesh(begun.mesh) if settings else None
        _, state = init_state(begun, mesh)
        ours = flat(state.params)
        assert ours.keys() == stored.keys()
        for name, x in stored.items():
            assert ours[name].dtype == np.float32
            np.testing.assert_array_equal(ours[name], x.astype(np.float32), err_msg=name)


def test_scanned_or_not_it_is_the_same_checkpoint(tmp_path):
    experiment = get_experiment("gemma2_tiny")
    published(tmp_path / "p", experiment)
    settings = [f"init_from={tmp_path / 'p'}", "model.scan_layers=false"]
    _, state = init_state(overlay(experiment, settings))
    apart = jaxalope.load(tmp_path / "p", param_dtype="float32").unrolled()
    jax.tree.map(np.testing.assert_array_equal, state.params, apart.params)


def test_retrofits_are_new_and_the_rest_is_the_checkpoint(tmp_path):
    experiment = get_experiment("gemma2_tiny")
    model = published(tmp_path / "p", experiment, dtype=None)
    settings = [f"init_from={tmp_path / 'p'}", "retrofits=decoding_heads"]
    _, state = init_state(overlay(experiment, settings))
    ours, theirs = flat(state.params), flat(model.params)
    assert {n.split(".")[0] for n in ours.keys() - theirs.keys()} == {"decoding_heads"}
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x)


def test_what_it_says_of_sampling_stays_with_the_run(tmp_path):
    experiment = get_experiment("gemma2_tiny")
    published(tmp_path / "p", experiment)
    settings = [f"init_from={tmp_path / 'p'}", "train.steps=4", "train.eval_every=none"]
    train(overlay(experiment, settings), tmp_path / "run", devices=ONE, quiet=True)
    (tmp_path / "p").rename(tmp_path / "gone")
    rest = overlay(experiment, [*settings, "train.steps=5"])
    train(rest, tmp_path / "run", devices=ONE, quiet=True)
    trained = jaxalope.load(tmp_path / "run")
    assert trained.defaults.to_json() == {"do_sample": True, "temperature": 0.6}
    jaxalope.save(trained, tmp_path / "back")
    assert json.loads((tmp_path / "back/generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("tiny", [], "init_from=.* is of the family 'gemma2', the experiment's model is of 'kimi"),
        ("gemma2_tiny", ["model.intermediate_size=40"], "do not fit its configuration"),
        ("gemma2_tiny", ["init_from=no/where"], "init_from='no/where'"),
    ],
)
def test_another_model_is_told_before_a_workdir_is_made(
    family, settings, message, tmp_path, monkeypatch
):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    published(tmp_path / "p", get_experiment("gemma2_tiny"))
    experiment = overlay(get_experiment(family), [f"init_from={tmp_path / 'p'}", *settings])
    with pytest.raises(InputError, match=message):
        train(experiment, tmp_path / "run", devices=ONE, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_field_that_differs_is_named(tmp_path):
    experiment = get_experiment("gemma2_tiny")
    published(tmp_path / "p", experiment)
    other = dataclasses.replace(experiment.model, rms_norm_eps=1e-3)
    begun = dataclasses.replace(experiment, model=other, init_from=str(tmp_path / "p"))
    with pytest.warns(UserWarning, match="rms_norm_eps: 1e-06 there, 0.001 here"):
        init_state(begun)
