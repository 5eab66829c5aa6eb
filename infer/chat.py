"""``chat``: an answer to messages, asked for in the model's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.chat import encode_chat
from ..errors import InputError
from ..model.handle import Model
from .driver import Generation
from .generate import generate
from .policy import Policy

Messages = Sequence[Mapping[str, Any]]


def chat(
    model: Model,
    messages: Messages | Sequence[Messages],
    policy: Policy | Sequence[Policy] | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Generation:
    """Answer a conversation, or each of several.

    Args:
        model: as :func:`jaxalope.load` returns it, with a chat template.
        messages: ``[{"role": "user", "content": "Hello"}, ...]``; or a list of such lists.
        policy: that tokens are drawn by, as for :func:`jaxalope.generate`.
        tools: JSON schemas of functions that the template tells the model of.
        continue_final_message: go on with the last message instead of answering it.
        template: another jinja2 template, or the name of one of the model's.
        variables: further names that the template knows.
        **settings: of :func:`jaxalope.generate`.

    Returns:
        The answers. ``text`` has no special tokens in it; ``tokens`` has.

    Raises:
        InputError: there is no tokenizer, template or message, the template refuses the messages,
            or a setting of :func:`jaxalope.generate` is out of range.
    """
    prompts = chat_prompts(
        model,
        messages,
        tools=tools,
        continue_final_message=continue_final_message,
        template=template,
        **(variables or {}),
    )
    return generate(model, prompts, policy, **settings)


def chat_prompts(
    model: Model, messages: Messages | Sequence[Messages], **settings: Any
) -> list[list[int]]:
    """The token ids that the model is asked to go on with, for each conversation.

    ``settings`` are those of :func:`~jaxalope.data.chat.render_chat`.
    """
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer, and so no chat; give generate token ids")
    if not len(messages):
        raise InputError("messages is empty; give at least one")
    chats = [messages] if isinstance(messages[0], Mapping) else messages
    return [encode_chat(model.tokenizer, one, **settings) for one in chats]
