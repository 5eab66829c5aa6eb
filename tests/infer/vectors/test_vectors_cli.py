"""A model that draws whole chunks, from the command line."""

import pytest

import jaxalope
import jaxalope.model


@pytest.fixture
def run(peaked, command_line):
    call = command_line(peaked)
    return lambda *arguments: call("--max_new_tokens=12", *arguments)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("temperature=0.6", jaxalope.ExactTemperature(0.6)),
        ("exact_temperature=0.6,max_draws=400", jaxalope.ExactTemperature(0.6, 400)),
        ("batch_temperature=0.5,num_draws=20", jaxalope.BatchTemperature(0.5, 20)),
    ],
)
def test_it_prints_what_generate_returns(peaked, run, text, policy):
    expected = jaxalope.generate(peaked, ["abcdef", "x"], policy, 12, seed=3, n=2, remainder="left")
    found = run(
        "--prompt=abcdef", "--prompt=x", f"--policy={text}", "--num_samples=2", "--seed=3",
        "--remainder=left",
    )  # fmt: skip
    prompts = ["abcdef", "abcdef", "x", "x"]
    lines = [p + t + "\n" for p, t in zip(prompts, expected.text, strict=True)]
    assert found.out == "".join(lines)
    assert f"chunks drawn: {expected.draws}" in found.err


def test_streamed_text_is_the_same(run):
    assert run("--prompt=abcd", "--stream").out == run("--prompt=abcd").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=abc"], "remainder='reject'"),
        (["--policy=top_p=0.9"], "TopP"),
        (["--policy=greedy"], "Greedy"),
        (["--policy=num_draws=20"], "batch_temperature; give that too"),
        (["--policy=batch_temperature=0.7"], "no whole number"),
        (["--policy=batch_temperature=0.5,temperature=0.5"], "give one of them"),
        (["--regex=a+"], "grammar"),
        (["--draft=lookup"], "draft"),
        (["--method=beam", "--prompt=abcd"], "jaxalope.generate"),
        (["--method=power", "--prompt=abcd"], "jaxalope.generate"),
        (["--method=beam", "--remainder=left"], "--remainder is for --method=sample"),
    ],
)
def test_what_does_not_go_together_is_one_line(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run("--prompt=abcd", *arguments)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
