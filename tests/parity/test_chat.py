"""Chats, tokenizers and generation settings against ``transformers``."""

import json

import pytest
import tokenizers as hf

transformers = pytest.importorskip("transformers")

from jaxalope.data.chat import encode_chat, render_chat  # noqa: E402
from jaxalope.data.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer  # noqa: E402
from jaxalope.errors import InputError  # noqa: E402
from jaxalope.model.generation_defaults import GenerationDefaults  # noqa: E402

pytestmark = pytest.mark.parity

# Written here, in the manner of the families that are named.
TEMPLATES = {
    "gemma-like": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('no system messages here') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('turns must alternate') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<turn>' + role + '\n' + message['content'] | trim + '</turn>\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}
""",
    "chatml-like": """{%- if tools %}
    {{- '<turn>system\nTools:\n' }}
    {%- for tool in tools %}{{- tool | tojson }}
{% endfor %}
    {{- '</turn>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<turn>' ~ message.role ~ '\n' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
        {{- '<think>' ~ message.reasoning_content ~ '</think>\n' }}
    {%- endif %}
    {%- generation %}
    {{- message.content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '\n' ~ call.function | tojson(indent=2) }}
        {%- endfor %}
    {%- endif %}
    {{- '</turn>\n' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>assistant\n' }}{% endif %}
{{- mood if mood is defined }}""",
    "kimi-like": """{%- macro content_of(message) %}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}{{- part.text }}{% else %}<media>{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}<turn>tool_declare{{ tools | tojson(separators=(',', ':')) }}</turn>{% endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}<turn>system<mid>be kind</turn>{% endif %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
<turn>{{ message.role }}<mid>{{ content_of(message) }}</turn>
{%- endfor %}
{%- if add_generation_prompt %}<turn>assistant<mid>{% endif %}
{{- strftime_now('%Y')[:2] }}{{ eos_token }}{{ pad_token }}""",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": "<b>é & 'ü'</b>",
            "also": {"b": 1, "a": 2},
        },
    }
]
CHATS = {
    "one turn": [{"role": "user", "content": " Hi <there> & 'you' 野 \n"}],
    "three turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b\n\n ", "reasoning": "hm", "refusal": None},
        {"role": "user", "content": "c"},
    ],
    "ends with an answer": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "once upon  ", "reasoning_content": "well"},
    ],
    "system": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]},
        {"role": "skip", "content": "y"},
    ],
    "calls": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": {"z": [1, 2.5, None, True]}}}]},
        {"role": "tool", "content": "21"},
    ],
}  # fmt: skip
SETTINGS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "tools": TOOLS, "mood": "<glad>"},
    {"continue_final_message": True},
]


def directory(path, template, in_config):
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<turn>", "</turn>", "<mid>"]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["system user assistant model the hare"] * 3, trainer)
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": {"content": "<pad>", "lstrip": False, "rstrip": False, "normalized": False,
                      "single_word": False, "special": True, "__type": "AddedToken"},
    }  # fmt: skip
    if in_config:
        config["chat_template"] = template
    else:
        (path / "chat_template.jinja").write_text(template)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("in_config", [False, True], ids=["file", "config"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_and_encoded_alike(name, in_config, tmp_path):
    path = directory(tmp_path, TEMPLATES[name], in_config)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(path)
    rendered = refused = 0
    for chat in CHATS.values():
        for settings in SETTINGS:
            try:
                expected = theirs.apply_chat_template(chat, tokenize=False, **settings)
            except Exception:  # Of several kinds: theirs, jinja2's, and plain TypeErrors.
                with pytest.raises(InputError):
                    render_chat(ours, chat, **settings)
                refused += 1
                continue
            assert render_chat(ours, chat, **settings) == expected
            ids = theirs.apply_chat_template(chat, return_dict=False, **settings)
            assert encode_chat(ours, chat, **settings) == ids
            rendered += 1
    assert rendered >= 10 and rendered + refused == len(CHATS) * len(SETTINGS)


def test_several_templates(tmp_path):
    sources = {
        "default": "d{{ messages | length }}",
        "tool_use": "{{ tools | length }}t",
        "rag": "r{{ documents[0].text }}",
    }
    named = [{"name": name, "template": source} for name, source in sources.items()]
    path = directory(tmp_path, named, True)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    chat = CHATS["one turn"]
    for settings in (
        {},
        {"tools": TOOLS},
        {"chat_template": "rag", "documents": [{"title": "", "text": "x"}]},
    ):
        expected = theirs.apply_chat_template(chat, tokenize=False, **settings)
        own = {{"chat_template": "template"}.get(k, k): v for k, v in settings.items()}
        assert render_chat(ours, chat, **own) == expected


def test_what_we_publish_is_what_they_read(tmp_path):
    trained = load_tokenizer(directory(tmp_path, "x", False))
    made_here = JsonTokenizer(
        trained.files()["tokenizer.json"], {"bos_id": 2, "eos_id": 1, "pad_id": None}
    )
    text = "the hare <|eos|> naïve 野うさぎ\n🦌 "
    for name, ours in (("bytes", ByteTokenizer()), ("made", made_here), ("read", trained)):
        (tmp_path / name).mkdir()
        for file, content in ours.files().items():
            (tmp_path / name / file).write_bytes(content)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text and len(theirs) == ours.vocab_size
        special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert special == (ours.bos_id, ours.eos_id, ours.pad_id)
        assert theirs(text)["input_ids"] == [ours.bos_id] * ours.add_bos + ids


def test_generation_settings_written_by_them(tmp_path):
    theirs = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[1, 107], max_new_tokens=9
    )
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "generation_config.json").read_text())
    ours = GenerationDefaults.from_json(values)
    assert (ours.do_sample, ours.temperature, ours.stop_tokens) == (True, 0.7, (1, 107))
    (tmp_path / "generation_config.json").write_text(json.dumps(ours.to_json()))
    again = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert again.to_dict() == theirs.to_dict()
