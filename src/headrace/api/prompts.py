"""From what a client sent to the token ids that the model is given.

In: texts, token ids, messages. Out: lists of token ids, or a refusal that names the field. Texts are held to
a length before the tokenizer sees them: its time grows with the text, and no context holds what is refused
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.api.errors import ApiError
from headrace.api.schema import ChatMessage, spelled
from headrace.api.served import ENCODE_INLINE_CHARACTERS, ServedModel, Server
from headrace.text import TextError

RENDER_INLINE_MESSAGES = 64
"""Conversations up to this length are rendered at once (about 1 ms), longer ones beside the event loop."""


async def conversation_tokens(
    server: Server,
    model: ServedModel,
    messages: Sequence[ChatMessage],
    arguments: Mapping[str, Any],
    *,
    add_special_tokens: bool = False,
) -> list[int]:
    """Token ids of a conversation as the model's chat template writes it. Raises ApiError, TextError."""
    template = model.chat_template
    if template is None:
        raise ApiError(
            400,
            f"the model {model.name!r} has no chat template; send a prompt to /v1/completions",
            param="messages",
        )

    def render() -> str:
        return template.render([message.model_dump() for message in messages], **arguments)

    characters = sum(len(message.content) for message in messages if isinstance(message.content, str))
    parts = sum(len(message.content) for message in messages if isinstance(message.content, list))
    check_length(server, characters, "messages")
    if len(messages) + parts <= RENDER_INLINE_MESSAGES and characters <= ENCODE_INLINE_CHARACTERS:
        return await encoded(server, model, render(), "messages", add_special_tokens=add_special_tokens)
    return await model.beside(lambda: _encode(server, model, render(), "messages", add_special_tokens))


async def encoded(
    server: Server, model: ServedModel, text: str, field: str, *, add_special_tokens: bool
) -> list[int]:
    """Token ids of one text of the field `field`. Raises ApiError, TextError."""
    if len(text) <= ENCODE_INLINE_CHARACTERS:
        return _encode(server, model, text, field, add_special_tokens)
    check_length(server, len(text), field)  # before it waits for its turn
    return await model.beside(lambda: _encode(server, model, text, field, add_special_tokens))


def _encode(server: Server, model: ServedModel, text: str, field: str, add_special_tokens: bool) -> list[int]:
    check_length(server, len(text), field)
    try:
        return model.tokenizer.encode(text, add_special_tokens)
    except TextError as error:
        raise TextError(f"{field}: {error}", error.field or field) from error


async def prompt_tokens(
    server: Server, model: ServedModel, prompt: Any, *, add_special_tokens: bool
) -> list[list[int]]:
    """The token ids of each prompt of a text completion, whichever of the four forms they came in."""
    if isinstance(prompt, str):
        return [await encoded(server, model, prompt, "prompt", add_special_tokens=add_special_tokens)]
    if isinstance(prompt[0], int):
        _check_tokens(server, model, prompt, "prompt")
        return [prompt]
    if isinstance(prompt[0], list):
        for number, tokens in enumerate(prompt):
            _check_tokens(server, model, tokens, f"prompt[{number}]")
        return list(prompt)
    check_length(server, sum(map(len, prompt)), "prompt")
    return [
        await encoded(server, model, one, "prompt", add_special_tokens=add_special_tokens) for one in prompt
    ]


def _check_tokens(server: Server, model: ServedModel, tokens: Sequence[int], field: str) -> None:
    """Raise a 400 that says where a token id is outside the vocabulary. The engine would not know where."""
    info = server.gateway.info_of(model.name)
    if info is None or not tokens or (min(tokens) >= 0 and max(tokens) < info.vocab_size):
        return
    at = next(at for at, token in enumerate(tokens) if not 0 <= token < info.vocab_size)
    where = f"{field}[{at}]"
    raise ApiError(
        400,
        f"{where} is {spelled(tokens[at])}, outside the vocabulary of {info.vocab_size}",
        param=where,
    )


def check_length(server: Server, characters: int, field: str) -> None:
    """Raise a 400 for more text than the server tokenises for one request."""
    most = server.options.max_prompt_characters
    if characters > most:
        raise ApiError(
            400, f"{field}: the text has {characters} characters, the limit is {most}", param=field
        )


def context_length(server: Server, model: ServedModel) -> int | None:
    """The longest prompt and output together, in tokens; None until the engine has said."""
    info = server.gateway.info_of(model.name)
    return info.max_model_len if info is not None else None
