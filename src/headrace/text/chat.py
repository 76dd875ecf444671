"""Conversations to prompts, by the model's own chat template.

In: messages as a client sends them. Out: the prompt's text. Templates are Jinja as transformers sets it up,
in a sandbox that bounds what they may spend.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError, TemplateSyntaxError

from headrace.store import ModelFiles

from .allowance import budget
from .errors import TemplateError, TextError
from .sandbox import SandboxedTemplates

MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_JSON_SPACE = 16
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled chat template. Safe to share between threads.

    `special_tokens` maps names such as "bos_token" to the token's text, for the template's use. `now` is
    asked by templates that write the date.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Raises `TemplateError` for what is not Jinja or too large."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateError(
                f"the chat template has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARACTERS}"
            )
        self._special_tokens = dict(special_tokens or {})
        environment = SandboxedTemplates(
            globals={"raise_exception": _raise, "strftime_now": lambda layout: now().strftime(layout)},
            filters={"tojson": _tojson},
        )
        try:
            with budget():
                self._template = environment.compile_bounded(source)
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid: line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:
            raise TemplateError(f"the chat template cannot be compiled: {_words(error)}") from error

    @classmethod
    def from_model(
        cls, files: ModelFiles, now: Callable[[], datetime] = datetime.now
    ) -> "ChatTemplate | None":
        """The template that came with a model; None for a model without one."""
        if files.chat_template is None:
            return None
        return cls(files.chat_template, special_tokens_of(files.tokenizer_config), now)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`, each with a "role" and a "content" that is text, None, or a list of text
        parts (joined by newlines). `kwargs` are further variables of the template.

        Raises `TemplateError` with the template's own words where it refuses the conversation, and
        `TextError` for content that is not text.
        """
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": [_plain_message(message, at) for at, message in enumerate(messages)],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with budget():
                return str(self._template.render(variables))
        except _RefusedError as refusal:
            raise TemplateError(str(refusal), field="messages") from None
        except SecurityError as error:
            raise TemplateError(
                f"the chat template does what it may not: {error}", field="messages"
            ) from error
        except Exception as error:
            raise TemplateError(
                f"the chat template failed on these messages: {_words(error)}", "messages"
            ) from error


def special_tokens_of(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that `tokenizer_config.json` names, for use in templates."""
    found = {}
    for name in SPECIAL_TOKENS:
        token = tokenizer_config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


class _RefusedError(Exception):
    """What a template says through `raise_exception`."""


def _raise(message: str) -> None:
    raise _RefusedError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    for space in (indent, *(separators or ())):
        if (len(space) if isinstance(space, str) else space or 0) > MAX_JSON_SPACE:
            raise SecurityError(f"it spaces out JSON by more than {MAX_JSON_SPACE} characters")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"{type(error).__name__}: {error}"[:500]


def _plain_message(message: Mapping[str, Any], at: int) -> dict[str, Any]:
    plain = dict(message)
    content = plain.get("content")
    if content is not None and not isinstance(content, str):
        plain["content"] = _joined_parts(content, f"messages[{at}].content")
    return plain


def _joined_parts(content: Any, field: str) -> str:
    if not isinstance(content, Sequence):
        raise TextError(f"{field} is {type(content).__name__}, not text or a list of parts", field)
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise TextError(
                f"{field}[{at}] is of type {kind!r}; this model reads text parts only", f"{field}[{at}].type"
            )
        if not isinstance(part.get("text"), str):
            raise TextError(f"{field}[{at}] has no text", f"{field}[{at}].text")
        texts.append(part["text"])
    return "\n".join(texts)
