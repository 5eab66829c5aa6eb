"""The sampler's command line: every method, and one clear error for what does not go together."""

import json

import jax
import pytest
from toys import SMALL

import jaxalope
import jaxalope.model
from jaxalope import Model
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.model import build_model
from jaxalope.sharding import init_params


@pytest.fixture(scope="module")
def model():
    graphdef, params = init_params(lambda key: build_model(SMALL, key), jax.random.key(0))
    return Model(SMALL, graphdef, params, load_tokenizer("bytes"))


@pytest.fixture
def run(model, command_line):
    call = command_line(model)
    return lambda *arguments: call("--max_new_tokens=12", *arguments)


def test_sampling_is_generate(model, run):
    policy = jaxalope.parse_policy("temperature=0.7,top_p=0.9")
    expected = jaxalope.generate(model, ["ab", "c"], policy, 12, seed=3, n=2).text
    found = run(
        "--prompt=ab", "--prompt=c", "--policy=temperature=0.7,top_p=0.9", "--seed=3",
        "--num_samples=2",
    )  # fmt: skip
    prompts = ["ab", "ab", "c", "c"]
    assert found.out == "".join(p + t + "\n" for p, t in zip(prompts, expected, strict=True))


def test_streamed_text_is_the_same(run):
    assert run("--prompt=ab", "--stream").out == run("--prompt=ab").out


def test_grammars(run, tmp_path):
    found = run("--prompt=x", "--regex=(ab|cd)+", "--stop=cdcd").out.strip()
    assert set(found[1:]) <= set("abcd")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": [17]}))
    assert run("--prompt=x", f"--json_schema={schema}").out.strip() == "x17"


def test_drafts(run):
    plain = run("--prompt=abab", "--policy=greedy").out
    drafted = run("--prompt=abab", "--policy=greedy", "--draft=lookup")
    assert drafted.out == plain
    assert "drafted tokens accepted" in drafted.err


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--method=power", "--block=6", "--mcmc_steps=2"], "acceptance of each block"),
        (["--method=smc", "--particles=3"], "effective sample size"),
        (["--method=beam", "--beams=3", "--policy=min_new_tokens=3"], "scores"),
    ],
    ids=["power", "smc", "beam"],
)
def test_methods(run, arguments, reported):
    found = run("--prompt=ab", *arguments)
    assert found.out.startswith("ab")
    assert reported in found.err


def test_a_model_runs_as_it_is_told(model, run, monkeypatch):
    asked = []

    def load(path, step=None, run=None):
        asked.append(run)
        return model

    plain = run("--prompt=ab").out
    monkeypatch.setattr(jaxalope.model, "load", load)
    ways = ("--run=scan_layers=False", "--run=kda_chunk_size=32", "--run=remat=full")
    assert run("--prompt=ab", *ways).out == plain
    assert asked == [{"scan_layers": "False", "kda_chunk_size": "32", "remat": "full"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method=power", "--policy=greedy"], "--policy is for --method=sample"),
        (["--beams=3"], "--beams is for --method=beam"),
        (["--policy=top_q=3"], "top_q"),
        (["--regex=a", "--json_schema=b"], "exclude each other"),
        (["--json_schema=/nowhere.json"], "/nowhere.json"),
        (["--method=power", "--alpha=0.5"], "alpha=0.5"),
        (["--stream", "--num_samples=2"], "--stream"),
        (["--alpha=2"], "--alpha is for --method=power or smc or lookahead, not sample"),
        (["--draft_tokens=2"], "--draft_tokens is for --draft"),
        (["--run=scan_layers"], "--run=scan_layers: write it as field=value"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        run("--prompt=ab", *arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert words in message


def test_a_model_that_cannot_be_read_this_time_is_one_line(run, capsys, monkeypatch):
    def closed(path, step=None, run=None):
        raise jaxalope.ReadError("the checkpoint of step 4 could not be read this time: ...")

    monkeypatch.setattr(jaxalope.model, "load", closed)
    with pytest.raises(SystemExit) as stopped:
        run("--prompt=ab")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: the checkpoint of step 4")
