"""Where a caller says nothing, a model's own settings hold; and chats go through them."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import TableConfig, table_model

import jaxalope
import jaxalope.model
from jaxalope import (
    BadWords,
    Chain,
    Greedy,
    InputError,
    LogitBias,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Typical,
)  # fmt: skip
from jaxalope.data.tokenizers import ByteTokenizer, Published
from jaxalope.infer.defaults import default_policy, settle, stop_ids
from jaxalope.infer.grammar import Regex
from jaxalope.infer.policy import stages
from jaxalope.model.generation_defaults import GenerationDefaults

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def plain():
    tokenizer = ByteTokenizer(Published({"chat_template.jinja": TEMPLATE.encode()}))
    toy = table_model(TableConfig(tokenizer.vocab_size, order=1))
    return dataclasses.replace(toy, tokenizer=tokenizer)


def said(**values):
    return GenerationDefaults.from_json(values)


@pytest.mark.parametrize(
    ("values", "policy"),
    [
        ({}, Temperature(1.0)),
        ({"eos_token_id": 3, "pad_token_id": 0}, Temperature(1.0)),
        ({"do_sample": False, "temperature": 0.3, "top_p": 0.4}, Greedy()),
        ({"do_sample": True}, Chain(Temperature(1.0), TopK(50))),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, Temperature(1.0)),
        ({"temperature": 0.6, "top_p": 0.95}, Chain(Temperature(0.6), TopP(0.95))),
        (
            {"do_sample": True, "temperature": 2, "top_k": 7, "top_p": 0.9, "min_p": 0.1,
             "typical_p": 0.8},
            Chain(Temperature(2), TopK(7), TopP(0.9), MinP(0.1), Typical(0.8)),
        ),
        (
            {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
            Chain(RepetitionPenalty(1.2), NoRepeatNgram(3), Greedy()),
        ),
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}, Temperature(1.0)),
    ],
)  # fmt: skip
def test_settings_as_a_policy(values, policy):
    assert default_policy(said(**values)) == policy


def test_forbidden_tokens_as_a_policy():
    values = {"suppress_tokens": [4, 2], "bad_words_ids": [[1, 2], [3]], "min_new_tokens": 5}
    policy = default_policy(said(**values), (9, 8))
    expected = [
        LogitBias({4: -np.inf, 2: -np.inf}), BadWords([[1, 2], [3]]), MinNewTokens(5, [9, 8]),
        Temperature(1.0),
    ]  # fmt: skip
    assert [type(stage) for stage in stages(policy)] == [type(stage) for stage in expected]
    for found, wanted in zip(stages(policy), expected, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
    # A text may end.
    (words, *_) = stages(default_policy(said(bad_words_ids=[[9], [1, 9]]), (9, 8)))
    np.testing.assert_array_equal(words.sequences, BadWords([[1, 9]]).sequences)
    # Nothing to hold back.
    assert default_policy(said(min_new_tokens=5)) == Temperature(1.0)


def test_a_setting_out_of_range_is_named():
    with pytest.raises(InputError, match=r"generation_config.json: top_p=1.5"):
        default_policy(said(do_sample=True, top_p=1.5))


def test_lengths_and_stops(plain):
    def lengths(given=None, bound=None, **values):
        model = dataclasses.replace(plain, defaults=said(**values))
        own = settle(model, None, given, bound, None, None)
        return own.max_new_tokens, own.max_length

    assert lengths() == (128, None)
    assert lengths(max_new_tokens=7, max_length=9) == (7, None)
    assert lengths(max_length=9) == (128, 9)
    assert lengths(max_length=9, bound=5) == (128, 5)
    assert lengths(3, max_new_tokens=7, max_length=9) == (3, None)
    assert stop_ids(plain) == (plain.tokenizer.eos_id,)
    assert stop_ids(dataclasses.replace(plain, defaults=said(eos_token_id=5))) == (5,)
    assert stop_ids(dataclasses.replace(plain, defaults=said(eos_token_id=[5, 6]))) == (5, 6)
    for strings, stops in (("x", ("x",)), (["x", "y"], ("x", "y")), (None, ())):
        model = dataclasses.replace(plain, defaults=said(stop_strings=strings))
        assert settle(model, None, None, None, None, None).stop == stops
        assert settle(model, None, None, None, None, ()).stop == ()
        assert settle(model, None, None, None, None, "z").stop == ("z",)


def test_a_row_holds_its_own_stop_tokens_back_only(plain):
    model = dataclasses.replace(plain, defaults=said(min_new_tokens=6, do_sample=False))
    settings = {"max_new_tokens": 8, "seed": [3, 3]}
    free = jaxalope.generate(plain, ["ab"], Greedy(), 8, stop_tokens=()).tokens[0]
    # What the row says of its own accord is its neighbour's stop token.
    stops = np.array([[5], [free[1]]])
    both = jaxalope.generate(model, ["ab", "ab"], stop_tokens=stops, **settings)
    assert both.tokens[0].tolist() == free.tolist()
    assert free[1] not in both.tokens[1][:6]


def test_generate_goes_by_them_and_arguments_win(plain):
    def tokens(out):
        return [row.tolist() for row in out.tokens]

    greedy = jaxalope.generate(plain, "ab", Greedy(), 12, stop_tokens=())
    (row,) = tokens(greedy)
    defaults = said(do_sample=False, max_new_tokens=12, eos_token_id=[row[7], 300])
    model = dataclasses.replace(plain, defaults=defaults)
    out = jaxalope.generate(model, "ab")
    end = row.index(row[7]) + 1
    assert tokens(out) == [row[:end]] and out.finish_reasons == ["stop"]
    assert "".join(p.text for p in jaxalope.stream(model, "ab")) == out.text[0]
    assert tokens(jaxalope.generate(model, "ab", stop_tokens=())) == [row]
    assert tokens(jaxalope.generate(model, "ab", max_new_tokens=3, stop_tokens=())) == [row[:3]]
    drawn = jaxalope.generate(model, "ab", Temperature(1.0), stop_tokens=(), seed=3)
    assert drawn.tokens[0].tolist() == tokens(
        jaxalope.generate(plain, "ab", Temperature(1.0), 12, stop_tokens=(), seed=3)
    )[0]  # fmt: skip
    assert drawn.tokens[0].tolist() != row


def test_a_grammars_text_ends_by_the_models_own_stop_token(plain):
    model = dataclasses.replace(plain, defaults=said(eos_token_id=300))
    out = jaxalope.generate(model, "x", grammar=Regex("ab"), max_new_tokens=5)
    assert out.text == ["ab"] and out.finish_reasons == ["stop"]
    assert out.tokens[0].tolist()[:2] == list(b"ab")
    assert plain.tokenizer.eos_id not in out.tokens[0]


def test_chat_is_generate_on_the_rendered_text(plain):
    ids = [plain.tokenizer.bos_id, *b"system: be\nuser: ab\n"]
    expected = jaxalope.generate(plain, [ids], Greedy(), 6)
    begun = dataclasses.replace(plain, add_bos=True)  # No second BOS.
    for model in (plain, begun):
        out = jaxalope.chat(model, MESSAGES, Greedy(), max_new_tokens=6)
        assert out.text == expected.text
    several = jaxalope.chat(plain, [MESSAGES, MESSAGES[1:]], Greedy(), max_new_tokens=6)
    alone = jaxalope.chat(plain, MESSAGES[1:], Greedy(), max_new_tokens=6)
    assert several.text == [*expected.text, *alone.text]


def test_chats_that_cannot_be(plain):
    with pytest.raises(InputError, match="no tokenizer"):
        jaxalope.chat(dataclasses.replace(plain, tokenizer=None), MESSAGES)
    with pytest.raises(InputError, match="no chat template"):
        jaxalope.chat(dataclasses.replace(plain, tokenizer=ByteTokenizer()), MESSAGES)
    with pytest.raises(InputError, match="messages is empty"):
        jaxalope.chat(plain, [])


def test_the_command_line(plain, command_line, capsys):
    model = dataclasses.replace(plain, defaults=said(do_sample=False, max_new_tokens=6))
    call = command_line(model)

    def run(*arguments):
        return call(*arguments).out

    expected = jaxalope.chat(plain, MESSAGES, Greedy(), max_new_tokens=6).text[0]
    assert run("--chat", "--system=be", "--prompt=ab") == expected + "\n"
    assert run("--chat", "--system=be", "--prompt=ab", "--stream") == expected + "\n"
    assert run("--prompt=ab") == "ab" + jaxalope.generate(model, "ab").text[0] + "\n"
    with pytest.raises(SystemExit):
        run("--system=be", "--prompt=ab")
    assert "--system is for --chat" in capsys.readouterr().err
