"""Conversations as a model was trained to read them, by its own jinja2 template.

The text is the one that `transformers` makes (`apply_chat_template`). Templates are published by
others: they run in jinja2's sandbox and see plain data only.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .tokenizers.protocol import Tokenizer

# Stands at the end of a message that is to be gone on with; no text has it.
_MARK = "\ue0f7\ue0f8 "
# Names under which a message's reasoning is passed; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    template: str | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation, special tokens written by name.

    Args:
      tokenizer: whose template and special tokens these are.
      messages: `{"role": ..., "content": ...}` each, and whatever else the template reads.
      tools: JSON schemas of functions.
      documents: for templates that read some.
      add_generation_prompt: end with what begins an answer; yes if None, unless a message is
        continued.
      continue_final_message: end inside the last message, so that the model goes on with it.
      template: a jinja2 source, or the name of one of the tokenizer's; if None `"tool_use"` where
        there are tools and there is one, else `"default"`.
      **variables: further names that the template knows, before special tokens of the same name.

    Raises:
      InputError: there is no template, it refuses the messages or cannot be run, or something in
        them is no plain data.
    """
    if continue_final_message and add_generation_prompt:
        raise InputError(
            "continue_final_message and add_generation_prompt exclude each other: an answer "
            "either goes on or begins"
        )
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    source = _source(tokenizer, template, tools)
    chat = _conversation(messages)
    tools = _plain(tools, "tools")
    if tools is not None and getattr(tokenizer, "sort_tools", False):
        tools = _sorted(tools)
    final = _mark_end(chat) if continue_final_message else None
    names = {
        "messages": chat,
        "tools": tools,
        "documents": _plain(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    names |= {**tokenizer.special_names, **_plain(variables, "variables")}
    text = _render(source, names)
    return text if final is None else _up_to_mark(text, final)


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **settings: Any
) -> list[int]:
    """Token ids of `render_chat(tokenizer, messages, **settings)`.

    BOS stands where the template writes it, and nowhere else. Names of special tokens inside of
    messages become these tokens too: whoever passes on what others wrote looks for them first.
    """
    return tokenizer.encode_marked(render_chat(tokenizer, messages, **settings))


def encode_answer(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **settings: Any
) -> tuple[list[int], list[int]]:
    """Token ids of what the last message answers, and of that message up to the text's end.

    The first are those that a sampler is given; both are tokenized apart, as they are there.

    Args:
      tokenizer: see `render_chat`.
      messages: at least a question and the answer.
      **settings: see `render_chat`.

    Raises:
      InputError: nothing is answered, the last message is no answer, or the template writes a
        conversation otherwise once it is answered.
    """
    if len(messages) < 2 or messages[-1].get("role") in ("user", "system", None):
        roles = [message.get("role") for message in messages]
        raise InputError(f"a chat to learn from ends with the answer to learn; its roles: {roles}")
    prompt = render_chat(tokenizer, messages[:-1], **settings)
    whole = render_chat(tokenizer, messages, add_generation_prompt=False, **settings)
    if not whole.startswith(prompt):
        raise InputError(
            "the chat template does not write an answered conversation as the question and then "
            f"the answer: {whole[: len(prompt) + 20]!r} does not begin with {prompt!r}; give "
            "prompts and answers in fields of their own"
        )
    return tokenizer.encode_marked(prompt), tokenizer.encode_marked(whole[len(prompt) :])


def _source(tokenizer: Tokenizer, template: str | None, tools: Any) -> str:
    own = tokenizer.chat_templates
    if template is not None:
        return own.get(template, template)
    if tools is not None and "tool_use" in own:
        return own["tool_use"]
    if "default" in own:
        return own["default"]
    if own:
        raise InputError(
            f"the tokenizer has chat templates {sorted(own)} and no default one; give template="
        )
    raise InputError(
        "the tokenizer has no chat template (chat_template.jinja, or chat_template in "
        "tokenizer_config.json): this model was not made for chats; give template=, or plain "
        "prompts"
    )


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not len(messages):
        raise InputError("messages is empty; give at least one")
    chat = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(
                f"messages[{i}]={message!r:.60} must be a mapping such as "
                '{"role": "user", "content": "..."}'
            )
        # Fields without a value are usual in requests over the wire; templates expect them absent.
        message = {k: v for k, v in _plain(message, f"messages[{i}]").items() if v is not None}
        said = next((message[name] for name in _REASONING if name in message), None)
        if said is not None:
            message = {"thinking": said, **message, "reasoning_content": said}
        chat.append(message)
    return chat


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Put the mark behind the last text of the last message; returns that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _MARK
        return content
    for block in reversed(content or []):
        if isinstance(block, dict) and "text" in block:
            text, block["text"] = block["text"], block["text"] + _MARK
            return text
    raise InputError("continue_final_message: the last message has no text to go on with")


def _up_to_mark(text: str, final: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise InputError(
            "continue_final_message: the chat template leaves out or changes the last message; "
            "end the conversation before it"
        )
    # A template that strips messages would have stripped this one's end too.
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _plain(value: Any, where: str) -> Any:
    """A copy of plain types only: a template can call whatever methods it is given."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # Enumerations, and NumPy's numbers of this kind.
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise InputError(
        f"{where} is a {type(value).__name__}; chat templates take text, numbers, booleans, lists "
        "and mappings (of a function, its JSON schema)"
    )


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, list) else value


def _render(source: str, names: Mapping[str, Any]) -> str:
    template = _compiled(source)
    try:
        return template.render(**names)
    except _Refused as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # Whatever somebody's template runs into.
        raise InputError(f"the chat template failed: {type(error).__name__}: {error}") from error


class _Refused(Exception):
    """Raised by a template, about its messages."""


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    """The template, in an environment as `transformers` gives it."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise InputError("chat templates need jinja2: pip install 'jaxalope[hf]'") from error

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant says; here it is text like any other."""

        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore, by which a sandbox could be left."""

        def __init__(*args, **kwargs):
            self, *rest = args
            named = dict(*rest, **kwargs)
            for name in named:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, named)

        def __setitem__(self, name, value):
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name):
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    class Dict:
        """Makes mappings, and cannot be asked about the class."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, keys, value=None):
            return dict.fromkeys(keys, value)

    def refuse(message):
        raise _Refused(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own escapes what HTML cannot hold.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is wrong in line {error.lineno}: {error}") from error
