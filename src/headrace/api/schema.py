"""The bodies that clients send, as OpenAI documents them and with the fields that vLLM's clients add.

Unknown fields are ignored, as OpenAI's clients expect; wrong types are refused. Fields that would change what
comes back and are not served are refused by name, never ignored. Limits of values are the engine's to state
(`engine/limits.py`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from headrace.engine.limits import MAX_LOGPROBS

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_PROMPTS = 256
MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 4096
MAX_LOGIT_BIAS = 4096
MAX_STOP_TOKEN_IDS = 1 << 18  # a whole vocabulary, of nearly every model
MAX_TOKEN_ID_DIGITS = 10
MAX_SALT_CHARACTERS = 256
MAX_TIMEOUT_S = 86_400
MAX_DETOKENIZED = 1_000_000
SEED_RANGE = (-(1 << 63), (1 << 64) - 1)
PRIORITY_RANGE = (-(1 << 31), (1 << 31) - 1)
TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "tools", "add_generation_prompt"})
"""What a chat template is given by other fields."""

PROMPT_FORMS = "send a text, an array of texts, an array of token ids, or an array of arrays of token ids"

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

Parts = Annotated[list[dict[str, Any]], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]
"""Lists end at their first wrong item: pydantic would note an error for each of a million."""
StopList = Annotated[list[str], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
StopStrings = str | StopList | None
TokenIds = Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def spelled(value: Any) -> str:
    """What a client sent, for an error about its type."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            return f"the number {value}" if abs(value) < 1e20 else "a number"
        case str():
            return f"the text {value!r}" if len(value) <= 40 else f"a text of {len(value)} characters"
        case list():
            return "an array"
        case _:
            return "an object"


def _refuse(value: Any) -> Any:
    if value is not None and value is not False:
        raise ValueError("this is not served; leave it out")
    return value


NotServed = Annotated[Any, AfterValidator(_refuse), WithJsonSchema({"enum": [None, False]})]
"""A field of other servers that would change the answer: refused by name, not ignored."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Body(BaseModel):
    """What all bodies have in common. None stands for a field that was not sent."""

    model_config = ConfigDict(strict=True)

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            return {name: value for name, value in fields.items() if value is not None}
        return fields


class SamplingFields(Body):
    """What chat and text completions have in common."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: int | None = None
    stop: StopStrings = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    seed: Annotated[int, Field(ge=SEED_RANGE[0], le=SEED_RANGE[1])] | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    priority: Annotated[int, Field(ge=PRIORITY_RANGE[0], le=PRIORITY_RANGE[1])] = 0
    cache_salt: str | None = None
    return_token_ids: bool = False
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)] | None = None

    structured_outputs: NotServed = None
    guided_json: NotServed = None
    guided_regex: NotServed = None
    guided_choice: NotServed = None
    guided_grammar: NotServed = None
    use_beam_search: NotServed = None
    bad_words: NotServed = None
    allowed_token_ids: NotServed = None
    truncate_prompt_tokens: NotServed = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("max_tokens", "max_completion_tokens", mode="before", check_fields=False)
    @classmethod
    def _counts_tokens(cls, count: Any) -> Any:
        if not isinstance(count, int) or isinstance(count, bool):
            raise ValueError(f"it must be an integer of at least 1, got {spelled(count)}")
        return count

    @field_validator("top_k")
    @classmethod
    def _all_or_some(cls, top_k: int | None) -> int | None:
        if top_k is not None and top_k < -1:
            raise ValueError(f"it must be at least 0, or -1 to keep all, got {spelled(top_k)}")
        return top_k

    @field_validator("stop", mode="before")
    @classmethod
    def _few_stops(cls, stop: Any) -> Any:
        if isinstance(stop, list) and len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"{len(stop)} stop strings, the limit is {MAX_STOP_STRINGS}")
        return stop

    @field_validator("stop")
    @classmethod
    def _bounded_stop(cls, stop: StopStrings) -> StopStrings:
        strings = [stop] if isinstance(stop, str) else stop or []
        if any(not 0 < len(string) <= MAX_STOP_CHARACTERS for string in strings):
            raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters")
        return stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"{len(bias)} token ids, the limit is {MAX_LOGIT_BIAS}")
        return bias

    @field_validator("logit_bias")
    @classmethod
    def _numbered_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_ID_DIGITS):
                raise ValueError(f"{key[:40]!r} is not a token id")
        return bias

    @field_validator("cache_salt")
    @classmethod
    def _short_salt(cls, salt: str | None) -> str | None:
        if salt is not None and len(salt) > MAX_SALT_CHARACTERS:
            raise ValueError(f"{len(salt)} characters, the limit is {MAX_SALT_CHARACTERS}")
        try:
            (salt or "").encode()
        except UnicodeEncodeError:
            raise ValueError("it is not valid Unicode") from None
        return salt

    @field_validator("stream_options")
    @classmethod
    def _options_of_streams(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream", True):
            raise ValueError("it is only for stream: true")
        return options


class ChatMessage(BaseModel):
    """One message. What it has beside role and content is handed to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, WithJsonSchema({"enum": list(ROLES)})]
    content: Annotated[str | Parts | None, Field(validate_default=True)] = None

    @field_validator("content")
    @classmethod
    def _something_said(
        cls, content: str | list[dict[str, Any]] | None, info: ValidationInfo
    ) -> str | list[dict[str, Any]] | None:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only a message of the assistant may go without content")
        return content

    @field_validator("role")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"there is no role {role[:40]!r}; the roles are {', '.join(ROLES)}")
        return role


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: str

    @field_validator("type")
    @classmethod
    def _only_text(cls, kind: str) -> str:
        if kind != "text":
            raise ValueError(f"{kind[:40]!r} is not served, only 'text' is")
        return kind


class TemplateFields(Body):
    """What a chat template is told beside the messages."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: NotServed = None
    documents: NotServed = None

    @property
    def template_arguments(self) -> dict[str, Any]:
        return {**(self.chat_template_kwargs or {}), "add_generation_prompt": self.add_generation_prompt}

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own_names(cls, arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        if taken := TEMPLATE_ARGUMENTS.intersection(arguments or ()):
            raise ValueError(f"{sorted(taken)[0]!r} is given by another field")
        return arguments

    @field_validator("continue_final_message")
    @classmethod
    def _no_continuation(cls, value: bool) -> bool:
        if value:
            raise ValueError("continuing the final message is not served")
        return value


class ChatCompletionRequest(SamplingFields, TemplateFields):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @field_validator("tools", "functions")
    @classmethod
    def _no_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise ValueError("calling tools is not served")
        return tools

    @field_validator("top_logprobs")
    @classmethod
    def _alternatives_need_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and not info.data.get("logprobs", True):
            raise ValueError("it is only for logprobs: true")
        return count


def _check_items(items: list[Any], kind: type | None, name: str) -> None:
    """Raise ValueError for the first item that is not of `kind`; None is no kind of a prompt at all."""
    if set(map(type, items)) <= {kind}:
        return
    at = next(at for at, item in enumerate(items) if type(item) is not kind)
    found = f"{name}[{at}] is {spelled(items[at])}"
    if kind is not None and type(items[at]) in (str, int, list):
        found += ": texts and token ids are mixed"
    raise ValueError(f"{found}; {PROMPT_FORMS}")


Prompt = str | list[str] | list[int] | list[list[int]]


def _some_prompts(prompt: Any) -> Any:
    """Here and not by the union, which tries every form on every item and keeps all errors of them all."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise ValueError(f"got {spelled(prompt)}; {PROMPT_FORMS}")
    if not prompt:
        raise ValueError("the list of prompts is empty")
    kind = type(prompt[0])
    if kind is not int and len(prompt) > MAX_PROMPTS:
        raise ValueError(f"{len(prompt)} prompts, the limit is {MAX_PROMPTS}")
    _check_items(prompt, kind if kind in (str, int, list) else None, "prompt")
    if kind is list:
        for number, tokens in enumerate(prompt):
            _check_items(tokens, int, f"prompt[{number}]")
    return prompt


class CompletionRequest(SamplingFields):
    prompt: Annotated[Prompt, PlainValidator(_some_prompts, json_schema_input_type=Prompt)]
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, suffix: str | None) -> str | None:
        if suffix:
            raise ValueError("completing before a suffix is not served")
        return suffix

    @field_validator("best_of")
    @classmethod
    def _best_of_is_n(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and "n" in info.data and best_of != (info.data["n"] or 1):
            raise ValueError("best_of other than n is not served")
        return best_of


class TokenizeRequest(TemplateFields):
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    tools: list[Any] | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise ValueError("calling tools is not served")
        return tools

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(Body):
    tokens: Annotated[list[int], Field(max_length=MAX_DETOKENIZED, fail_fast=True)]
