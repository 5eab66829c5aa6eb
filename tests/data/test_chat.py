"""Chats by a model's own template; `tests/parity/test_chat.py` compares with `transformers`."""

import datetime
import enum

import pytest

from jaxalope.data.chat import encode_chat, render_chat
from jaxalope.data.tokenizers import ByteTokenizer, Published, TiktokenTokenizer
from jaxalope.errors import InputError

pytest.importorskip("jinja2")

TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message.role == 'joker' %}
        {{ raise_exception('no jokers') }}
    {% endif %}
[{{ message.role }}] {{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
[model]{% endif %}"""
HELLO = [{"role": "user", "content": " Hello <&> "}]
ANSWER = [*HELLO, {"role": "model", "content": "I am "}]


def with_template(template=TEMPLATE, **named):
    files = {"chat_template.jinja": template.encode()} if template is not None else {}
    files |= {f"additional_chat_templates/{n}.jinja": t.encode() for n, t in named.items()}
    return ByteTokenizer(Published(files))


def test_a_chat_by_hand():
    text = render_chat(with_template(), HELLO)
    assert text == "<|bos|>[user] Hello <&><|eos|>\n[model]"
    assert render_chat(with_template(), ANSWER, add_generation_prompt=False) == (
        "<|bos|>[user] Hello <&><|eos|>\n[model] I am<|eos|>\n"
    )


def test_bos_comes_once_and_only_from_the_template():
    tokenizer = with_template()
    ids = encode_chat(tokenizer, HELLO)
    assert ids == [257, *b"[user] Hello <&>", 258, *b"\n[model]"]
    plain = with_template("{{ messages[0].content }}")
    assert encode_chat(plain, HELLO) == [*b" Hello <&> "]


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{{ messages[-1].content }}|", "I am "), ("{{ messages[-1].content | trim }}|", "I am")],
)
def test_going_on_with_the_last_message(template, expected):
    found = render_chat(with_template(template), ANSWER, continue_final_message=True)
    assert found == expected
    blocks = [{"role": "model", "content": [{"text": "no"}, {"text": "I am "}, {"image": 1}]}]
    template = template.replace(".content", ".content[1].text")
    found = render_chat(with_template(template), blocks, continue_final_message=True)
    assert found == expected
    assert blocks[0]["content"][1] == {"text": "I am "}


def test_the_template_is_chosen_by_name_or_by_tools():
    tokenizer = with_template("usual", tool_use="{{ tools[0].name }}", rag="rag")
    assert render_chat(tokenizer, HELLO) == "usual"
    assert render_chat(tokenizer, HELLO, tools=[{"name": "clock"}]) == "clock"
    assert render_chat(tokenizer, HELLO, template="rag") == "rag"
    assert render_chat(tokenizer, HELLO, template="{{ x }}{{ tools }}", x=3) == "3None"
    with pytest.raises(InputError, match=r"\['rag'\] and no default"):
        render_chat(with_template(None, rag="rag"), HELLO)


def test_tools_are_sorted_for_the_tokenizers_that_ask_for_it():
    tokenizer, tools = with_template("{{ tools | tojson }}"), [{"b": [{"d": 1, "c": 2}], "a": 3}]
    assert render_chat(tokenizer, HELLO, tools=tools) == '[{"b": [{"d": 1, "c": 2}], "a": 3}]'
    tokenizer.sort_tools = TiktokenTokenizer.sort_tools
    assert render_chat(tokenizer, HELLO, tools=tools) == '[{"a": 3, "b": [{"c": 2, "d": 1}]}]'


def test_what_templates_can_call():
    def shown(template, **variables):
        return render_chat(with_template(template), HELLO, **variables)

    assert shown("{{ x | tojson }}", x={"é": "<'&'>"}) == '{"é": "<\'&\'>"}'
    assert shown("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 1, "a": 2}) == (
        '{\n "a": 2,\n "b": 1\n}'
    )
    year = datetime.datetime.now().year
    assert shown("{{ strftime_now('%Y') }}") in {str(year), str(year + 1)}
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert shown(loop) == "01"
    assert shown("{% generation %}{% set y = 2 %}a{% endgeneration %}{{ y }}b") == "ab"
    assert shown("{% set n = namespace(i=1) %}{% set n.i = n.i + 1 %}{{ n.i }}") == "2"
    assert shown("{{ dict(a=1) }}{{ dict.fromkeys(['b']) }}") == "{'a': 1}{'b': None}"


def test_fields_without_a_value_are_absent_and_reasoning_has_one_name():
    messages = [{"role": "user", "content": "x", "tool_calls": None, "reasoning": "hm"}]
    template = "{{ messages[0].tool_calls is defined }} {{ messages[0].reasoning_content }}"
    assert render_chat(with_template(template), messages) == "False hm"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(_x=1) %}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_templates_stay_in_their_box(template):
    try:
        assert render_chat(with_template(template), HELLO) == ""
    except InputError as error:
        assert "SecurityError" in str(error)


def test_text_of_a_richer_kind_is_only_text():
    class Role(enum.StrEnum):
        USER = "user"

    template = "{{ messages[0].role }} {{ messages[0].role.name is defined }}"
    assert render_chat(with_template(template), [{"role": Role.USER}]) == "user False"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hello"]}, r"messages\[0\]='hello' must be a mapping"),
        ({"messages": [{"role": "joker", "content": ""}]}, "refuses these messages: no jokers"),
        ({"messages": [{"role": "user", "content": object()}]}, r"\['content'\] is a object"),
        ({"tools": [len]}, r"tools\[0\] is a builtin.*JSON schema"),
        ({"template": "{% if %}"}, "wrong in line 1"),
        ({"template": "{{ messages[0].content + 1 }}"}, "template failed: TypeError"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ({"continue_final_message": True, "template": "x"}, "leaves out or changes"),
        ({"continue_final_message": True, "messages": [{"role": "user"}]}, "no text to go on"),
    ],
)
def test_what_cannot_be_rendered_says_so(change, words):
    with pytest.raises(InputError, match=words):
        render_chat(with_template(), **{"messages": HELLO, **change})


def test_a_tokenizer_without_a_template_says_so():
    with pytest.raises(InputError, match="no chat template"):
        render_chat(ByteTokenizer(), HELLO)
