"""The clients of a simulated cluster: requests of every kind, impatience, and a check of all that comes back.

In: a cluster, and a seed from which each client has its random stream. Out: how its request ended. Anything
else than what it produces when nothing disturbs it is a `Violation`: a wrong token, a second ending, the
cache of another tenant.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.cluster import Gateway
from headrace.cluster.journey import Journey
from headrace.cluster.stream import OutputStream
from headrace.engine import RequestRefused
from headrace.protocol.requests import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    RequestError,
    SamplingParams,
    SequenceOutput,
)
from headrace.sim.cluster import SimCluster, Violation

TENANTS = ("", "", "blue", "green")
MEAN_GAP_S = 0.02
"""Between the arrivals of two clients, while few of them wait."""
OPEN_PER_WORKER = 3.0
"""Requests that are open at most for each worker that decodes, but for floods."""
LATEST_CANCEL = 3000
"""A client that gives up soon does so within so many callbacks: between any two of them."""
CROSSING_S = 0.01
"""How long an order may take to a worker that says goodbye meanwhile."""
_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


def draw_request(generator: random.Random, number: int) -> GenerateRequest:
    """A request of any kind; many begin alike, those of other tenants too."""
    shared = [8 + generator.randrange(3)] * 16
    prompt = shared[: generator.choice([0, 8, 16])]
    prompt += [generator.randrange(8, 1000) for _ in range(generator.choice([1, 6, 20, 50, 90]))]
    sampling = SamplingParams(
        max_tokens=generator.choice([1, 3, 10, 40, 100, 140]),
        temperature=generator.choice([0.0, 1.0]),
        n=generator.choice([1, 1, 1, 2, 3]),
        seed=generator.randrange(1 << 32),
        logprobs=generator.choice([None, None, 1]),
        prompt_logprobs=generator.choice([None, None, None, None, 1]),
        min_tokens=generator.choice([0, 0, 1]),
        ignore_eos=generator.random() < 0.5,
    )
    salt = generator.choice(TENANTS)
    return GenerateRequest(request_id=f"r{number}", prompt=prompt, sampling=sampling, cache_salt=salt)


@dataclass(slots=True, eq=False)
class _Answer:
    """What a client has got so far."""

    request: GenerateRequest
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    told: list[Any] = field(default_factory=list)
    endings: dict[int, FinishReason] = field(default_factory=dict)
    errors: list[RequestError] = field(default_factory=list)
    cached: int | None = None

    def take(self, output: SequenceOutput) -> None:
        name, index = self.request.request_id, output.index
        if index in self.endings:
            raise Violation(f"{name} sample {index} goes on after its ending")
        self.tokens.setdefault(index, []).extend(output.tokens)
        self.logprobs.setdefault(index, []).extend(output.logprobs or [])
        if output.prompt_logprobs is not None:
            self.told.append(output.prompt_logprobs)
        if index == 0 and output.cached_tokens is not None:
            self.cached = output.cached_tokens
        if output.finish is not None:
            self.endings[index] = output.finish.reason
            error = output.finish.error
            if error is not None and error.code is not ErrorCode.UNAVAILABLE:
                raise Violation(f"{name} sample {index} ended with {error}")
            if error is not None:
                self.errors.append(error)


class Load:
    """All clients of one life."""

    def __init__(self, cluster: SimCluster, seed: int, *, orderly: bool = False) -> None:
        """`orderly`: workers come and go only by being drained, and links are quick."""
        self._cluster = cluster
        self._seed = seed
        self._orderly = orderly
        self._numbers = 0
        self._open = 0
        self._overloads = 0
        self._group: asyncio.TaskGroup | None = None
        self._asked: list[GenerateRequest] = []
        self.endings: Counter[str] = Counter()
        """How samples ended; `left` are those whose client left, `refused` whole requests."""

    @property
    def accepted(self) -> int:
        """Requests that were accepted so far."""
        return len(self._asked)

    async def run(self, enough: Callable[[], bool]) -> None:
        """Let clients come until there are `enough`, and see all of them off."""
        chance = random.Random(f"{self._seed} arrivals")
        decoders = sum(worker.role.decodes for worker in self._cluster.workers.values())
        async with asyncio.TaskGroup() as self._group:
            while not enough():
                if self._open < OPEN_PER_WORKER * decoders:
                    self._group.create_task(self._client())
                await asyncio.sleep(chance.expovariate(1 / MEAN_GAP_S))
        self._group = None

    def next_request(self) -> tuple[GenerateRequest, random.Random]:
        """Another request, and the chances of who asks it."""
        number, self._numbers = self._numbers, self._numbers + 1
        chance = random.Random(f"{self._seed} {number}")
        return draw_request(chance, number), chance

    def flood(self, gateway: str, count: int) -> int:
        """Let so many clients come at once with short requests; returns how many were refused."""
        before = self._overloads
        asked = self._cluster.gateways[gateway].gateway
        for _ in range(count if asked is not None else 0):
            request, _ = self.next_request()
            short = msgspec.structs.replace(request.sampling, max_tokens=1, n=1)
            self._ask_beside(asked, msgspec.structs.replace(request, sampling=short))
        return self._overloads - before

    def _ask_beside(self, gateway: Gateway | None, request: GenerateRequest) -> None:
        if gateway is None or self._group is None:
            return
        with self._cluster.on(gateway):
            stream = self._submit(gateway, request)
            if stream is not None:
                self._group.create_task(self._follow(gateway, request, stream, None, None))

    async def _client(self) -> None:
        """Ask, perhaps lose patience, and see that all that came is right."""
        request, chance = self.next_request()
        patience = chance.choice([None, None, None, 0, chance.randrange(1, 60)])
        gateway = self._cluster.gateways[chance.choice(list(self._cluster.gateways))].gateway
        if gateway is None:
            self.endings["refused"] += 1
            return
        self._open += 1
        try:
            await self.ask(gateway, request, patience, chance)
        finally:
            self._open -= 1

    async def ask(
        self,
        gateway: Gateway,
        request: GenerateRequest,
        patience: int | None = None,
        chance: random.Random | None = None,
    ) -> None:
        """One request, from asking to its end; after `patience` tokens (0: soon) its client has enough."""
        with self._cluster.on(gateway):
            stream = self._submit(gateway, request)
            if stream is not None:
                await self._follow(gateway, request, stream, patience, chance)

    def _submit(self, gateway: Gateway, request: GenerateRequest) -> OutputStream | None:
        try:
            stream = gateway.submit(request)
        except RequestRefused as refused:
            if refused.error.code not in (ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED):
                raise Violation(f"{request.request_id} was refused with {refused.error}") from refused
            self.endings["refused"] += 1
            self._overloads += refused.error.code is ErrorCode.OVERLOADED
            return None
        self._asked.append(request)
        return stream

    async def _follow(
        self,
        gateway: Gateway,
        request: GenerateRequest,
        stream: OutputStream,
        patience: int | None,
        chance: random.Random | None,
    ) -> None:
        answer = _Answer(request)
        if patience == 0 and chance is not None:
            callbacks = int(math.exp(chance.uniform(0, math.log(LATEST_CANCEL))))
            self._cluster.simulation.loop.call_after(callbacks, stream.cancel, request.request_id)
            patience = None
        async for outputs in stream:
            for output in outputs:
                answer.take(output)
            if patience is not None and sum(map(len, answer.tokens.values())) >= patience:
                patience = None
                if chance is not None and chance.random() < 0.5:
                    stream.close()
                else:
                    stream.cancel(request.request_id)
        self._check(answer, stream)
        if self._orderly:
            _check_drained(gateway.journeys.of(request.request_id)[0])
        # Who asked meanwhile may have put its prompt into the cache as well.
        self._check_tenant(answer, gateway, [other for other in self._asked if other is not request])
        for error in answer.errors:
            self._excuse(error, request, gateway)
        for index in range(request.sampling.n):
            self.endings[answer.endings.get(index, "left")] += 1

    def _excuse(self, error: RequestError, request: GenerateRequest, gateway: Gateway) -> None:
        """An error must come of two deaths, of waiting in vain, of a lone worker's or a gateway's death."""
        (journey,) = gateway.journeys.of(request.request_id)
        replayed = any(entry.what in ("replayed", "prefill worker lost") for entry in journey.entries)
        decoders = sum(worker.role.decodes for worker in self._cluster.workers.values())
        former = [dead for one in self._cluster.gateways.values() for dead in one.former]
        # A gateway that began anew expects only those workers back that it has met, and one whose clock has
        # jumped believes that it has waited long for them.
        alone = decoders == 1 or bool(former or self._cluster.stepped & set(self._cluster.gateways))
        if not (
            gateway in former
            or (replayed and "workers were lost under the request" in error.message)
            or (replayed and "no other worker was free within" in error.message)
            or (alone and "the engine was lost under the request" in error.message)
            or (alone and "the engine was lost before the request's turn" in error.message)
        ):
            raise Violation(f"{request.request_id} ended with what nothing excuses: {error.message}")

    def _check(self, answer: _Answer, stream: OutputStream) -> None:
        request, endings = answer.request, answer.endings
        name = request.request_id
        if len(endings) != request.sampling.n and not stream.closed:
            raise Violation(f"{name} ended {len(endings)} of {request.sampling.n} samples")
        for index, got in answer.tokens.items():
            alone = self._cluster.expected(request, index)
            wanted = alone.tokens if endings.get(index) in _WHOLE else alone.tokens[: len(got)]
            if got != wanted:
                raise Violation(f"{name} sample {index} ({endings.get(index)}) is {got}, alone {wanted}")
            if alone.logprobs is not None and answer.logprobs[index] != alone.logprobs[: len(got)]:
                raise Violation(f"{name} sample {index} has other log-probabilities than alone")
        if answer.told and answer.told != [self._cluster.expected(request, 0).prompt_logprobs]:
            raise Violation(f"{name} was told of its prompt's log-probabilities {len(answer.told)} times")
        if not answer.told and request.sampling.prompt_logprobs is not None and endings.get(0) in _WHOLE:
            raise Violation(f"{name} was not told of its prompt's log-probabilities")

    def _check_tenant(self, answer: _Answer, gateway: Gateway, others: Sequence[GenerateRequest]) -> None:
        """What was cached of a prompt was computed for the same tenant, or for an attempt at it before."""
        request = answer.request
        if not answer.cached:
            return
        (journey,) = gateway.journeys.of(request.request_id)
        if [entry.what for entry in journey.entries].count("placed") > 1:
            return
        most = max(
            (
                self._common(request.prompt, other, index)
                for other in others
                if other.cache_salt == request.cache_salt
                for index in range(other.sampling.n)
            ),
            default=0,
        )
        if answer.cached > most:
            raise Violation(
                f"{request.request_id} found {answer.cached} tokens of its prompt cached, and its tenant "
                f"{request.cache_salt!r} had no more than {most} of them computed"
            )

    def _common(self, prompt: Sequence[int], other: GenerateRequest, index: int) -> int:
        """How much of a prompt a sample of another request has in common with it."""
        common = _common(prompt, other.prompt)
        if common < len(other.prompt):
            return common
        return common + _common(prompt[common:], self._cluster.expected(other, index).tokens)


def _check_drained(journey: Journey) -> None:
    """A drained worker left only when all was over that it had; an order may have crossed its goodbye."""
    placed_s = {"prefill worker lost": 0.0, "replayed": 0.0}
    for entry in journey.entries:
        if entry.what == "placed":
            placed_s["replayed"] = entry.at_s
        elif entry.what == "prefill placed":
            placed_s["prefill worker lost"] = entry.at_s
        elif entry.what in placed_s and "it was drained" in str(entry.detail.get("why")):
            for_s = entry.at_s - placed_s[entry.what]
            if for_s > CROSSING_S:
                raise Violation(
                    f"{journey.request_id} was left by {entry.worker}, which had drained, after {for_s:.3f} s"
                )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of what two sequences begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
