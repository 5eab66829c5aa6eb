import json

import pytest

from jaxalope.configs import (
    EXPERIMENTS,
    experiment_from_dict,
    experiment_to_dict,
    get_experiment,
)
from jaxalope.errors import InputError

_FILE = """
import dataclasses
from jaxalope.configs import get_experiment

def experiment():
    return dataclasses.replace(get_experiment("tiny"), name="mine")
"""


def test_a_python_file_and_the_json_of_a_workdir_are_experiments(tmp_path):
    (tmp_path / "mine.py").write_text(_FILE)
    mine = get_experiment(str(tmp_path / "mine.py"))
    assert mine.name == "mine"
    (tmp_path / "experiment.json").write_text(json.dumps(experiment_to_dict(mine)))
    assert get_experiment(str(tmp_path / "experiment.json")) == mine


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_json_under_its_own_name(name):
    experiment = get_experiment(name)
    assert experiment.name == name
    values = json.loads(json.dumps(experiment_to_dict(experiment)))
    assert experiment_from_dict(values) == experiment


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match=r"config='dmeo' is no experiment; did you mean 'demo'\?"):
        get_experiment("dmeo")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", None, "there is no such file"),
        ("a.py", "x = 1", r"defines no function `experiment\(\)`"),
        ("a.py", "def experiment():\n    return 3", "returned a int"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[]", "a JSON object with a `model`"),
    ],
)
def test_a_file_without_an_experiment_is_an_error(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        get_experiment(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.json", "a.py", "run"])
def test_a_folder_is_not_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name}' is a folder; .*{name}/experiment\.json"):
        get_experiment(str(tmp_path / name))


# arXiv 2510.26692, the scaling-law table: tokens, learning rate, sequences a batch, layers, width.
@pytest.mark.parametrize(
    ("name", "tokens", "learning_rate", "batch_size", "layers", "width"),
    [
        ("kimi_linear_653m", 38.8e9, 2.006e-3, 336, 16, 1216),
        ("kimi_linear_878m", 59.8e9, 1.790e-3, 432, 18, 1376),
        ("kimi_linear_1b1", 85.2e9, 1.617e-3, 512, 20, 1536),
        ("kimi_linear_1b4", 102.5e9, 1.486e-3, 576, 22, 1632),
        ("kimi_linear_1b7", 128.0e9, 1.371e-3, 640, 24, 1776),
    ],
)
def test_scaling_law_experiments_are_the_published_ones(
    name, tokens, learning_rate, batch_size, layers, width
):
    e = get_experiment(name)
    assert (e.schedule.kind, e.optimizer.kind) == ("wsd", "muon")
    assert e.schedule.learning_rate == learning_rate
    assert (e.data.batch_size, e.data.sequence_length) == (batch_size, 4096)
    assert e.train.steps * e.data.batch_size * e.data.sequence_length == pytest.approx(
        tokens, rel=1e-4
    )
    assert (e.model.num_layers, e.model.hidden_size) == (layers, width)
