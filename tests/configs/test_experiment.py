import dataclasses
import json

import pytest

from jaxalope.configs import (
    EXPERIMENTS,
    diff,
    experiment_from_dict,
    experiment_to_dict,
    get_experiment,
    overlay,
)
from jaxalope.errors import InputError


def _through_json(experiment):
    return experiment_from_dict(json.loads(json.dumps(experiment_to_dict(experiment))))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_json_gives_back_the_named_experiment(name):
    experiment = get_experiment(name)
    assert experiment.name == name
    assert _through_json(experiment) == experiment


def test_json_gives_back_every_kind_and_every_sort_of_value():
    experiment = overlay(
        get_experiment("tiny"),
        [
            "optimizer=adamw",
            "schedule=linear",
            "train.profile_steps=2,3",
            "train.clip_norm=none",
            "data.sources=a,b",
            "rules.batch=data",
        ],
    )
    assert _through_json(experiment) == experiment
    values = experiment_to_dict(experiment)
    assert (values["optimizer"]["kind"], values["schedule"]["kind"]) == ("adamw", "linear")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("train", "stepz"), 3, r"train.stepz: TrainConfig has no field .*'steps'"),
        (("train", "steps"), "3", r"train.steps='3' cannot be used; train.steps wants int"),
        (("train", "steps"), True, r"wants int"),
        (("optimizer", "kind"), "sgd", r"optimizer.kind='sgd' is not known; use one of"),
        (("data", "batch_size"), 2.5, r"data.batch_size=2.5"),
        (("model", "family"), "gpt", r"gpt"),
        (("optimizer", "eps"), float("inf"), r"optimizer.eps=inf: must be positive and finite"),
        (("optimizer", "rms"), float("inf"), r"optimizer.rms=inf: must be positive and finite"),
    ],
)
def test_json_that_does_not_fit_names_the_field(path, value, message):
    values = experiment_to_dict(get_experiment("tiny"))
    values[path[0]][path[1]] = value
    with pytest.raises(InputError, match=message):
        experiment_from_dict(values)


def test_a_model_that_is_no_object_is_named():
    values = experiment_to_dict(get_experiment("tiny")) | {"model": 5}
    with pytest.raises(InputError, match=r"model=5 cannot be used; give an object .*kimi_linear"):
        experiment_from_dict(values)


def test_json_may_leave_out_what_has_a_default_but_not_what_has_none():
    values = experiment_to_dict(get_experiment("tiny"))
    del values["checkpoint"], values["train"]["clip_norm"]
    assert experiment_from_dict(values).train.clip_norm == 1.0
    del values["train"]["steps"]
    with pytest.raises(InputError, match="train lacks steps"):
        experiment_from_dict(values)


def test_diff_names_fields_and_both_values():
    tiny = get_experiment("tiny")
    other = overlay(tiny, ["train.steps=9", "model.num_experts=8", "data.sources=x"])
    assert diff(tiny, tiny) == []
    assert sorted(diff(tiny, other)) == [
        "data.sources.0.path: stdlib -> x",
        "model.num_experts: 4 -> 8",
        "train.steps: 8 -> 9",
    ]


def test_an_experiment_checks_its_parts_against_each_other():
    tiny = get_experiment("tiny")
    with pytest.raises(InputError, match=r"train.accumulation=3: must divide data.batch_size=4"):
        dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, accumulation=3))


@pytest.mark.parametrize(
    ("name", "settings", "field"),
    [
        ("calm_autoencoder_tiny", ["objective.dropped_token_id=999"], "objective.dropped_token_id"),
        ("llada_tiny", ["objective.eos_padding=true", "model.eos_token_id=999"], "eos_token_id"),
    ],
)
def test_ids_that_no_text_holds_have_to_be_in_the_vocabulary(name, settings, field):
    """Reading them from a table, or scoring them, is undefined; no batch would show it."""
    with pytest.raises(InputError, match=rf"{field}=999: is outside the vocabulary"):
        overlay(get_experiment(name), settings)
