"""Requests with the times at which they arrive: of a published trace, or made up by seed.

In: a file in the format of Mooncake's or Azure's trace, or a description of sessions. Out: arrivals, whose
prompts are built when they are due, since an hour of them is more than fits into memory. It must not know who
serves them.

Traces do not carry texts. Where one says which blocks of a prompt are those of another (Mooncake's hash ids,
one for 512 tokens), these blocks have the same tokens here, and no two others do; without, no two prompts
have a block in common. A prefix cache can tell no more, so a block's tokens are its number and zeros.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.bench.files import TRACE_BLOCK_TOKENS, TraceRequest, read_trace
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.sim.modelled_executor import modelled_token

DIGIT = 30_000
"""Numbers of blocks are written in digits below this: in the vocabulary of any model of interest."""
_DIGITS = 3
_FIRST_PRIVATE = 1 << 40
"""Numbers of blocks that no trace has begin here."""
_ZEROS = [0] * TRACE_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a prompt that have a name: equal names begin with equal tokens. Names are numbers."""

    name: int
    length: int

    def tokens(self) -> list[int]:
        name, tokens = self.name, []
        for _ in range(_DIGITS):
            name, digit = divmod(name, DIGIT)
            tokens.append(digit + 1)
        tokens += _ZEROS[: self.length] if self.length <= TRACE_BLOCK_TOKENS else [0] * self.length
        return tokens[: self.length]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a modelled engine answered to an earlier prompt, sent back as part of this one."""

    seed: int
    prompt_length: int
    length: int

    def tokens(self, vocab_size: int) -> list[int]:
        first = self.prompt_length
        return [modelled_token(self.seed, p, vocab_size) for p in range(first, first + self.length)]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to be. Lengths in tokens."""

    name: str
    at_s: float
    pieces: tuple[Piece | Answer, ...]
    output_length: int
    seed: int = 0
    priority: int = 0
    tenant: str = ""
    session: str = ""
    """Requests of one session come from one user; empty where nobody says so."""

    @property
    def input_length(self) -> int:
        return sum(piece.length for piece in self.pieces)

    def request(self, vocab_size: int) -> GenerateRequest:
        """The request; it ends after exactly as many tokens as it is to have."""
        prompt: list[int] = []
        for piece in self.pieces:
            prompt += piece.tokens(vocab_size) if isinstance(piece, Answer) else piece.tokens()
        sampling = SamplingParams(max_tokens=self.output_length, seed=self.seed, ignore_eos=True)
        return GenerateRequest(
            request_id=self.name,
            prompt=prompt,
            sampling=sampling,
            priority=self.priority,
            tenant=self.tenant,
        )


def read_arrivals(path: Path, max_length: int) -> list[Arrival]:
    """The requests of a Mooncake (JSON lines) or Azure (CSV) trace in order of time, from 0 s on.

    What does not fit into `max_length` tokens, prompt and output together, is left out. Raises ValueError,
    which names the line.
    """
    return of_trace(read_trace(path), max_length)


def of_trace(trace: Iterable[TraceRequest], max_length: int) -> list[Arrival]:
    """As `read_arrivals`, of a trace that was read."""
    arrivals: list[Arrival] = []
    requests = list(trace)
    for number, (request, at_s) in enumerate(zip(requests, _spread(requests), strict=True)):
        output = max(1, request.output_length)
        if request.input_length + output > max_length:
            continue
        if request.hash_ids:
            left, pieces = request.input_length, []
            for hash_id in request.hash_ids:
                pieces.append(Piece(hash_id, min(left, TRACE_BLOCK_TOKENS)))
                left -= TRACE_BLOCK_TOKENS
        else:
            pieces = [Piece(_FIRST_PRIVATE + number, request.input_length)]
        arrivals.append(Arrival(f"r{number}", at_s, tuple(pieces), output, seed=number))
    return arrivals


def _spread(requests: Sequence[TraceRequest]) -> Iterator[float]:
    """When each request is due, from 0 s on; those of one time are spread evenly until the next one.

    Clocks of traces are coarse: Mooncake's tells three seconds apart. Requests that really came together by
    the dozen would wait for each other as no real ones do.
    """
    times = sorted({request.at_s for request in requests})
    ends = [*times[1:], 2 * times[-1] - times[-2] if len(times) > 1 else times[0]] if times else []
    lengths = {begin: end - begin for begin, end in zip(times, ends, strict=True)}
    alike = Counter(request.at_s for request in requests)
    before: Counter[float] = Counter()
    for request in requests:
        at_s = request.at_s
        yield at_s - times[0] + lengths[at_s] * before[at_s] / alike[at_s]
        before[at_s] += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Conversations: each begins with one of a few system prompts, and goes on with all that was said.

    Times in seconds, lengths in tokens; lengths and gaps are drawn evenly from half to one and a half of
    what is given, turns from 1 to twice as many, the gaps between sessions from an exponential distribution.
    """

    rate: float = 2.0
    """Sessions that begin in a second."""
    system_prompts: int = 4
    system_length: int = 2000
    turns: int = 5
    turn_length: int = 200
    output_length: int = 300
    gap_s: float = 30.0
    """From one turn to the next: reading, thinking, typing, and the time that the answer took."""

    def arrivals(self, count: int, seed: int, max_length: int) -> list[Arrival]:
        """The first so many requests in order of time; a session ends where it would be too long.

        Raises ValueError where its first turn may be too long already.
        """
        most = math.ceil(self.system_length + 1.5 * (self.turn_length + self.output_length))
        if most > max_length:
            raise ValueError(
                f"the first turn of a conversation has up to {most} tokens with its answer, and the longest "
                f"sequence is {max_length}; shorten it, or give a trace"
            )
        begun: list[Arrival] = []
        at_s = 0.0
        chance = random.Random(f"{seed} sessions")
        for number in itertools.count():
            at_s += chance.expovariate(self.rate)
            # Nothing that begins later is among the first `count`.
            if len(begun) >= count and at_s > sorted(a.at_s for a in begun)[count - 1]:
                break
            begun += self._session(number, at_s, random.Random(f"{seed} session {number}"), max_length)
        begun.sort(key=lambda arrival: (arrival.at_s, arrival.name))
        return begun[:count]

    def _session(self, number: int, at_s: float, chance: random.Random, max_length: int) -> Iterator[Arrival]:
        def about(mean: float) -> float:
            return chance.uniform(0.5 * mean, 1.5 * mean)

        pieces: tuple[Piece | Answer, ...] = (
            Piece(_FIRST_PRIVATE + chance.randrange(self.system_prompts), self.system_length),
        )
        for turn in range(chance.randint(1, 2 * self.turns - 1)):
            said = Piece((number + 1) * 1000 + turn, max(1, round(about(self.turn_length))))
            pieces = (*pieces, said)
            output = max(1, round(about(self.output_length)))
            seed = number * 1000 + turn
            arrival = Arrival(f"s{number}-{turn}", at_s, pieces, output, seed=seed, session=f"s{number}")
            if arrival.input_length + output > max_length:
                return
            yield arrival
            pieces = (*pieces, Answer(seed, arrival.input_length, output))
            at_s += about(self.gap_s)


def at_rate(arrivals: list[Arrival], rate: float) -> list[Arrival]:
    """The same requests in the same order, with all gaps changed so that `rate` of them come in a second.

    Raises ValueError for a rate that is none, or arrivals that all come at once.
    """
    if not 0 < rate < float("inf"):
        raise ValueError(f"the rate must be above 0 requests a second, got {rate:g}")
    span_s = arrivals[-1].at_s - arrivals[0].at_s if arrivals else 0.0
    if span_s <= 0:
        raise ValueError(f"{len(arrivals)} requests that come all at once have no rate to change")
    factor = (len(arrivals) / rate) / span_s
    return [replace(arrival, at_s=arrival.at_s * factor) for arrival in arrivals]
