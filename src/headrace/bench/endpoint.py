"""An OpenAI-compatible address as a target: discovers the model, builds bodies, keeps records.

In: turns. Out: records of what the server streamed back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
import orjson

from headrace.bench.errors import BenchError, RequestFailed
from headrace.bench.http import Answer as HttpAnswer
from headrace.bench.http import Clock, HttpClient, Origin
from headrace.bench.record import Record
from headrace.bench.stream import StreamReader, error_text
from headrace.bench.target import Answer, Target, Turn

Route = Literal["completions", "chat"]
PATHS: dict[Route, str] = {"completions": "/completions", "chat": "/chat/completions"}


class _Card(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Card]


class OpenAIClient:
    """Requests to one address: its models, and streamed answers."""

    def __init__(self, url: str, *, api_key: str | None = None, now: Clock = time.perf_counter) -> None:
        """`url` with or without the trailing /v1. Raises BenchError for what is not a URL."""
        origin = Origin.parse(url)
        if not origin.path.endswith("/v1"):
            origin = Origin(origin.secure, origin.host, origin.port, f"{origin.path}/v1")
        self.origin = origin
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = HttpClient(origin, headers, now=now)

    async def choose_model(self, wanted: str | None) -> str:
        """`wanted`, if it is served here, or the first model that is. Raises BenchError that says what is
        wrong.
        """
        try:
            answer = await self._http.get("/models")
        except RequestFailed as error:
            raise BenchError(
                f"{error}; start a server there (headrace serve MODEL), or give another address with --url"
            ) from None
        if answer.status in (404, 405) and wanted is not None:
            return wanted  # some proxies forward completions only
        models = _models_of(answer, self.origin)
        if wanted is None:
            return models[0]
        if wanted not in models:
            raise BenchError(f"{self.origin} does not serve {wanted!r}; it serves {', '.join(models)}")
        return wanted

    async def stream(
        self, route: Route, body: Mapping[str, object], on_text: Callable[[str, bool], None] | None = None
    ) -> StreamReader:
        """Post `body` and read its stream to the end. Raises RequestFailed."""
        reader = StreamReader(on_text)
        await self.run(route, body, reader)
        return reader

    async def run(self, route: Route, body: Mapping[str, object], reader: StreamReader) -> None:
        """Like `stream`, with a reader that the caller keeps if this raises."""
        await self._http.post(PATHS[route], orjson.dumps(body), reader)
        reader.check()

    def close(self) -> None:
        self._http.close()


def _models_of(answer: HttpAnswer, origin: Origin) -> list[str]:
    if answer.status in (401, 403):
        raise BenchError(
            f"{origin} refuses to list its models ({answer.status}: {error_text(bytes(answer.body))}); "
            "give its key with --api-key"
        )
    if answer.status == 200:
        try:
            models = [card.id for card in msgspec.json.decode(answer.body, type=_Models).data]
        except msgspec.DecodeError:
            models = None
        if models == []:
            raise BenchError(f"{origin} answers, but serves no model")
        if models is not None:
            return models
    kind = answer.headers.get("content-type", "no content type")
    raise BenchError(
        f"{origin}/models answered {answer.status} with {kind}, which is not OpenAI's list of models; "
        "is the address right?"
    )


class EndpointTarget(Target):
    """Turns over HTTP."""

    def __init__(
        self,
        client: OpenAIClient,
        model: str,
        route: Route,
        *,
        temperature: float = 0.0,
        ignore_eos: bool = True,
        extra: Mapping[str, object] | None = None,
        token_ids: bool,
    ) -> None:
        """`extra` is merged into every body, None removes a field. `token_ids` asks the server for the ids
        it chose (`return_token_ids`, as vLLM has it).
        """
        self._client = client
        self._route = route
        self.name = f"{model} at {client.origin} ({route})"
        self._fields: dict[str, object] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": temperature,
        }
        if ignore_eos:
            self._fields["ignore_eos"] = True
        if token_ids:
            self._fields["return_token_ids"] = True
        self._extra = dict(extra or {})

    def body(self, turn: Turn) -> dict[str, object]:
        """The request's body."""
        body = dict(self._fields)
        if self._route == "completions":
            body["prompt"] = turn.prompt
        elif turn.messages is not None:
            body["messages"] = turn.messages
        else:
            body["messages"] = [{"role": "user", "content": turn.prompt}]
        if turn.max_tokens is not None:
            body["max_tokens"] = turn.max_tokens
        if turn.seed is not None and body["temperature"]:
            body["seed"] = turn.seed
        body.update(self._extra)
        return {name: value for name, value in body.items() if value is not None}

    async def send(self, turn: Turn, record: Record) -> Answer:
        reader = StreamReader()
        record.times = reader.times  # a run's progress counts them as they come
        try:
            await self._client.run(self._route, self.body(turn), reader)
        finally:
            _write_down(reader, record)
        return Answer("".join(reader.text), reader.token_ids)

    async def close(self) -> None:
        self._client.close()


def _write_down(reader: StreamReader, record: Record) -> None:
    record.sent_s = reader.sent_s
    record.first_byte_s = reader.first_byte_s
    record.sizes = reader.sizes()
    record.counted = reader.counted
    record.finish_reason = reader.finish_reason
    record.output_tokens = sum(record.sizes)
    if reader.usage is not None:
        record.input_tokens = reader.usage.prompt_tokens
        if reader.usage.completion_tokens is not None:
            record.output_tokens = reader.usage.completion_tokens
        if reader.usage.prompt_tokens_details is not None:
            record.cached_tokens = reader.usage.prompt_tokens_details.cached_tokens
