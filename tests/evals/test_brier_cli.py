"""``python -m jaxalope.evals``: numbers, JSON, and one clear error."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

import jaxalope
from jaxalope.data.config import DataConfig, SourceConfig
from jaxalope.data.pipeline import eval_batches
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.evals import brier_lm
from jaxalope.model import LLaDAConfig, Model, build_model
from jaxalope.sharding import init_params


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(
        LLaDAConfig.tiny(), block_size=1, logit_shift=True, num_layers=1, scan_layers=False
    )
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    return Model(config, graphdef, params, load_tokenizer("bytes"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The command as a process: flags of two command lines share their names in one."""
    here = tmp_path_factory.mktemp("evals")
    jaxalope.save(model, here / "model")
    (here / "text.txt").write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(40)))

    def call(*arguments):
        command = [sys.executable, "-m", "jaxalope.evals"]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, cwd=here, check=False
        )
        return done.returncode, done.stdout, done.stderr

    call.here = here
    return call


def test_the_numbers_are_those_of_brier_lm(model, run):
    path, output = str(run.here / "text.txt"), run.here / "out.json"
    status, out, err = run(
        "--model=model", f"--data={path}", "--sequence_length=64", "--batch_size=4",
        "--num_batches=1", "--num_positions=6", "--seed=3", f"--output={output}",
    )  # fmt: skip
    assert status == 0, err
    data = DataConfig(64, 4, eval_sources=(SourceConfig(path),))
    want = brier_lm(
        model, eval_batches(data, model.tokenizer, 1), num_positions=6, batch_size=4, seed=3
    )
    assert out == f"{want}\n" and "exact last factor" in out and want.positions == 24
    values = json.loads(output.read_text())
    assert values["factors"] == want.factors.tolist() and values["seed"] == 3
    assert values["positions"] == 24 and values["exact_last"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model=model"], "--data is missing"),
        (["--model=model", "--data=HERE/none"], "HERE/none"),
        (["--model=model", "--num_positions=-1"], "--num_positions=-1"),
        (["--model=model", "--data=HERE/text.txt", "--batch_size=0"], "batch_size=0"),
        (["--model=model", "--data=HERE/text.txt", "--output=HERE/no/x"], "--output=HERE/no/x"),
    ],
)
def test_bad_input_is_one_line_and_status_two(run, arguments, message):
    here = str(run.here)
    status, out, err = run(*(a.replace("HERE", here) for a in arguments))
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.replace("HERE", here) in err
