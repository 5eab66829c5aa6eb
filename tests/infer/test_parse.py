"""Policies from the command line: names, order, types, and what a slip of the pen is told."""

import pytest

from jaxalope import (
    BatchTemperature,
    Chain,
    ExactTemperature,
    Greedy,
    InputError,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    Predicted,
    PresenceFrequencyPenalty,
    RepetitionPenalty,
    SoftTopP,
    Temperature,
    TopK,
    TopP,
    Typical,
    parse_policy,
)
from jaxalope.infer.parse import _NAMES


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("greedy", Greedy()),
        ("temperature=0.7", Temperature(0.7)),
        ("top_p=0.95,temperature=0.7", Chain(Temperature(0.7), TopP(0.95))),
        (" top_k = 40 , min_p=5e-2,", Chain(TopK(40), MinP(0.05))),
        ("typical=0.9", Typical(0.9)),
        ("soft_top_p=0.9", SoftTopP(0.9)),
        ("soft_top_p_sharpness=10,soft_top_p=0.9", SoftTopP(0.9, 10.0)),
        ("predicted", Predicted()),
        ("predicted_soft", Predicted(soft=True)),
        ("frequency_penalty=0.5", PresenceFrequencyPenalty(0.0, 0.5)),
        (
            "frequency_penalty=0.5,presence_penalty=-1,penalize_prompt=TRUE",
            PresenceFrequencyPenalty(-1.0, 0.5, True),
        ),
        (
            "no_repeat_ngram=3,greedy,repetition_penalty=1.1",
            Chain(RepetitionPenalty(1.1), NoRepeatNgram(3), Greedy()),
        ),
        ("exact_temperature=0.7", ExactTemperature(0.7)),
        ("max_draws=500,exact_temperature=0.3", ExactTemperature(0.3, 500)),
        ("batch_temperature=0.5,num_draws=100", BatchTemperature(0.5, 100)),
    ],
)
def test_a_list_becomes_its_stages_in_the_usual_order(text, policy):
    assert parse_policy(text) == policy


EXCLUDED = ("greedy", "exact_temperature", "batch_temperature", "max_draws", "num_draws")
OTHERS = {Greedy, ExactTemperature, BatchTemperature}


def test_every_name_is_known():
    """All of them at once but for those that exclude each other."""
    values = {int: "2", float: "0.5", bool: "false"}
    text = ",".join(
        name if convert is None else f"{name}={values[convert]}"
        for name, (_, _, convert) in _NAMES.items()
        if name not in EXCLUDED
    )
    policy = parse_policy(text, stop_tokens=[1])
    ranks = [stage.rank for stage in policy.policies]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)
    assert {type(stage) for stage in policy.policies} | OTHERS == {k for k, _, _ in _NAMES.values()}


def test_min_new_tokens_holds_back_the_stop_tokens():
    policy = parse_policy("min_new_tokens=5", stop_tokens=(7, 8, 9))
    assert isinstance(policy, MinNewTokens) and policy.count == 5
    assert policy.stop_tokens[:3].tolist() == [7, 8, 9]
    with pytest.raises(InputError, match="min_new_tokens holds stop tokens back; there are none"):
        parse_policy("min_new_tokens=5")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "policy='' names no stage; write for example temperature=0.7"),
        (" , ", "names no stage"),
        ("temprature=0.7", "no 'temprature'; did you mean 'temperature'"),
        ("topp=0.9", "did you mean 'top_p'"),
        ("repetition=1.1", "did you mean 'repetition_penalty'"),
        ("xyzzy=1", "no 'xyzzy'; its names are"),
        ("temperature", "temperature='' must be a number"),
        ("temperature=warm", "temperature='warm' must be a number"),
        ("top_k=2.5", "top_k='2.5' must be a whole number"),
        ("penalize_prompt=maybe", "penalize_prompt='maybe' must be true or false"),
        ("greedy=1", "greedy=1 takes no value; write greedy alone"),
        ("top_p=0.9,top_p=0.8", "gives top_p twice"),
        ("greedy,temperature=1", "has greedy and temperature; give one"),
        ("soft_top_p_sharpness=3", "is a setting of soft_top_p"),
        ("top_p=1.5", "top_p=1.5 must be above 0"),
        ("temperature=-1", "temperature=-1.0 must be"),
        ("temperature=nan", "temperature=nan must be"),
    ],
)
def test_what_is_wrong_is_said(text, words):
    with pytest.raises(InputError, match=words):
        parse_policy(text)
