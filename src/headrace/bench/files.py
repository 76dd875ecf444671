"""Workloads from files: prompts as JSON lines, and the two formats of published request traces.

In: a path that the user gives. Out: workloads. A broken line is refused with file, line and reason before
anything is sent. Traces carry lengths and not texts, so their prompts are random; where a trace says which
blocks of a prompt are equal to blocks of others, they are equal here too.
"""

from __future__ import annotations

import csv
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.bench.errors import BenchError
from headrace.bench.target import Turn
from headrace.bench.workload import (
    Form,
    Session,
    Single,
    Stream,
    Vocabulary,
    Workload,
    as_text,
    generator,
)

TRACE_BLOCK_TOKENS = 512
"""Tokens behind each hash id of a Mooncake trace."""

_BLOCKS_KEPT = 4096


class _Line(msgspec.Struct, forbid_unknown_fields=False):
    prompt: str | list[int] | None = None
    messages: list[dict[str, object]] | None = None
    max_tokens: int | None = None


class PromptFile(Workload):
    """JSON lines, each with `prompt` (text or token ids) or `messages`, and perhaps `max_tokens`."""

    def __init__(self, path: Path, form: Form, max_tokens: int) -> None:
        """`max_tokens` is for lines that do not say. Raises BenchError."""
        self._lines = [_read_line(path, number, line, form) for number, line in _lines_of(path)]
        if not self._lines:
            raise BenchError(f"{path} has no line with a prompt")
        self._max_tokens = max_tokens
        self.requests = len(self._lines)
        self.description = f"{len(self._lines)} prompts of {path.name}"
        self._rounds = 1

    def sessions(self, requests: int | None) -> Iterator[Session]:
        number = 0
        while requests is None or number < requests:
            line = self._lines[number % len(self._lines)]
            self._rounds = 1 + number // len(self._lines)
            max_tokens = line.max_tokens if line.max_tokens is not None else self._max_tokens
            yield Single(Turn(line.prompt, line.messages, max_tokens, seed=number))
            number += 1

    def notes(self) -> list[str]:
        return [f"the prompts were gone through {self._rounds} times"] if self._rounds > 1 else []


def _lines_of(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from None


def _read_line(path: Path, number: int, text: str, form: Form) -> _Line:
    try:
        line = msgspec.json.decode(text, type=_Line)
    except msgspec.DecodeError as error:
        raise BenchError(f"{path}, line {number}: {error}") from None
    if (line.prompt is None) == (line.messages is None):
        raise BenchError(f"{path}, line {number}: expected is either prompt or messages")
    if not (line.prompt or line.messages):
        raise BenchError(f"{path}, line {number}: the prompt is empty")
    if form is Form.TOKENS and line.messages is not None:
        raise BenchError(f"{path}, line {number}: messages need --endpoint chat")
    if form is Form.MESSAGES and isinstance(line.prompt, list):
        raise BenchError(f"{path}, line {number}: token ids need --endpoint completions")
    if line.max_tokens is not None and line.max_tokens < 1:
        raise BenchError(f"{path}, line {number}: max_tokens must be at least 1, got {line.max_tokens}")
    return line


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace. Lengths in tokens."""

    at_s: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    """One for each block of the prompt, the last of which may be short; empty where the trace has none."""


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a Mooncake (JSON lines) or Azure (CSV) trace in order of time. Raises BenchError.

    Mooncake: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (one for each 512 tokens of the
    prompt). Azure: `arrived_at` (s), `num_prefill_tokens`, `num_decode_tokens`.
    """
    lines = list(_lines_of(path))
    if not lines:
        raise BenchError(f"{path} is empty")
    if lines[0][1].lstrip().startswith("{"):
        requests = [_read_mooncake(path, number, line) for number, line in lines]
    else:
        requests = _read_azure(path, [line for _, line in lines])
    for number, request in enumerate(requests, 1):
        if request.input_length < 1 or request.output_length < 0 or not 0 <= request.at_s < float("inf"):
            raise BenchError(
                f"{path}, request {number}: a time of {request.at_s:g} s with {request.input_length} tokens "
                f"in and {request.output_length} out cannot be"
            )
    return sorted(requests, key=lambda request: request.at_s)


def _read_mooncake(path: Path, number: int, text: str) -> TraceRequest:
    try:
        line = msgspec.json.decode(text, type=_MooncakeLine)
    except msgspec.DecodeError as error:
        raise BenchError(f"{path}, line {number}: not a line of a Mooncake trace: {error}") from None
    blocks = -(-line.input_length // TRACE_BLOCK_TOKENS)
    if len(line.hash_ids) != blocks:
        raise BenchError(
            f"{path}, line {number}: {len(line.hash_ids)} hash ids for {line.input_length} tokens; at "
            f"{TRACE_BLOCK_TOKENS} tokens each it should be {blocks}"
        )
    if min(line.hash_ids, default=0) < 0:
        raise BenchError(f"{path}, line {number}: a hash id is negative")
    return TraceRequest(line.timestamp / 1e3, line.input_length, line.output_length, tuple(line.hash_ids))


_AZURE_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def _read_azure(path: Path, lines: list[str]) -> list[TraceRequest]:
    rows = csv.DictReader(lines)
    if not set(_AZURE_COLUMNS) <= set(rows.fieldnames or ()):
        raise BenchError(
            f"{path} is neither a Mooncake trace (JSON lines) nor an Azure trace (CSV with the columns "
            f"{', '.join(_AZURE_COLUMNS)})"
        )
    requests = []
    for number, row in enumerate(rows, 2):
        try:
            at, inputs, outputs = (row[column] for column in _AZURE_COLUMNS)
            requests.append(TraceRequest(float(at), int(inputs), int(outputs)))
        except (TypeError, ValueError) as error:
            raise BenchError(f"{path}, line {number}: {error}") from None
    return requests


class TraceWorkload(Workload):
    """A trace replayed: its times, its lengths, and the prefixes its requests share."""

    def __init__(
        self,
        name: str,
        trace: list[TraceRequest],
        form: Form,
        *,
        seed: int,
        time_scale: float = 1.0,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`time_scale` multiplies times: 0.1 replays ten times as fast, 0 sends all at once. Longer prompts
        keep their first `max_input_len` tokens. Raises BenchError.
        """
        if not 0 <= time_scale < float("inf"):
            raise BenchError(f"the time scale must be at least 0, got {time_scale:g}")
        for what, limit in (("input", max_input_len), ("output", max_output_len)):
            if limit is not None and limit < 1:
                raise BenchError(f"the maximum {what} length must be at least 1 token, got {limit}")
        self.requests = len(trace)
        self._trace = trace
        self._form = form
        self._seed = seed
        self._time_scale = time_scale
        self._max_input_len = max_input_len
        self._max_output_len = max_output_len
        self._vocabulary = vocabulary or Vocabulary()
        self._blocks: OrderedDict[int, list[int]] = OrderedDict()
        self._made = self._clipped_inputs = self._clipped_outputs = 0
        span = trace[-1].at_s - trace[0].at_s
        self.description = f"{name}, {len(trace)} requests over {span:.0f} s"

    def sessions(self, requests: int | None) -> Iterator[Session]:
        for number, request in enumerate(self._trace[:requests]):
            yield Single(self._turn(number, request))

    def due(self) -> Iterator[float]:
        first = self._trace[0].at_s
        return ((request.at_s - first) * self._time_scale for request in self._trace)

    def notes(self) -> list[str]:
        notes = (
            [] if self._time_scale == 1 else [f"the trace's times were multiplied by {self._time_scale:g}"]
        )
        for what, clipped, limit in (
            ("prompts", self._clipped_inputs, self._max_input_len),
            ("outputs", self._clipped_outputs, self._max_output_len),
        ):
            if clipped:
                notes.append(f"{clipped} of {self._made} {what} were clipped to {limit} tokens")
        return notes

    def _turn(self, number: int, request: TraceRequest) -> Turn:
        length, output = request.input_length, max(1, request.output_length)
        self._made += 1
        if self._max_input_len is not None and length > self._max_input_len:
            length = self._max_input_len
            self._clipped_inputs += 1
        if self._max_output_len is not None and output > self._max_output_len:
            output = self._max_output_len
            self._clipped_outputs += 1
        tokens = self._prompt(number, request, length)
        if self._form is Form.TOKENS:
            return Turn(prompt=tokens, max_tokens=output, seed=number)
        messages = [{"role": "user", "content": as_text(tokens)}]
        return Turn(messages=messages, max_tokens=output, seed=number)

    def _prompt(self, number: int, request: TraceRequest, length: int) -> list[int]:
        if not request.hash_ids:
            return self._vocabulary.tokens(generator(self._seed, Stream.SESSION, number), length)
        needed = -(-length // TRACE_BLOCK_TOKENS)
        tokens = [token for hash_id in request.hash_ids[:needed] for token in self._block(hash_id)]
        return tokens[:length]

    def _block(self, hash_id: int) -> list[int]:
        tokens = self._blocks.get(hash_id)
        if tokens is None:
            random = generator(self._seed, Stream.BLOCK, hash_id)
            tokens = self._blocks[hash_id] = self._vocabulary.tokens(random, TRACE_BLOCK_TOKENS)
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(hash_id)
        return tokens
