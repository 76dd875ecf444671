"""Scenarios: an engine's limits and a history of arrivals, cancellations and steps, drawn from one generator.

The same generator serves hypothesis (which shrinks what fails) and fixed lists of seeds.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

from hypothesis import HealthCheck, settings

from headrace.engine import GroupSpec, SchedulerConfig
from headrace.protocol.requests import GenerateRequest, SamplingParams

EXAMPLES = int(os.environ.get("HEADRACE_EXAMPLES", "1"))
"""Multiplies the examples of every property test; the suite runs with 1."""

VOCAB = 37
EOS = frozenset({0, 1})


def examples(count: int) -> settings:
    """Hypothesis settings of this folder: deterministic, and free of wall time."""
    return settings(
        max_examples=count * EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@dataclass(frozen=True)
class Arrive:
    request: GenerateRequest


@dataclass(frozen=True)
class Cancel:
    request_id: str
    index: int | None


@dataclass(frozen=True)
class Step:
    pass


@dataclass(frozen=True)
class Scenario:
    """What is run: the limits of an engine, and what happens to it in which order."""

    config: SchedulerConfig
    num_blocks: int
    block_size: int
    groups: tuple[GroupSpec, ...]
    actions: tuple[Arrive | Cancel | Step, ...]

    @property
    def requests(self) -> list[GenerateRequest]:
        return [action.request for action in self.actions if isinstance(action, Arrive)]


def draw_scenario(rng: random.Random) -> Scenario:
    """Any scenario: mostly tight ones, where blocks, rows and budget run out."""
    groups = tuple(GroupSpec(None if full else rng.randint(1, 12)) for full in rng.choice(_GROUP_SETS))
    block_size = rng.choice([1, 1, 2, 2, 3, 4, 5, 8, 16])
    max_num_seqs = rng.randint(1, 6)
    config = SchedulerConfig(
        max_model_len=rng.randint(6, 70),
        vocab_size=VOCAB,
        eos_token_ids=EOS,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 2, 3, 6, 30]),
        max_waiting=rng.choice([3, 8, 100, 100]),
        reuse_prefix=rng.random() < 0.8,
        steps_in_flight=rng.randint(1, 3),
    )
    longest = -(-config.max_model_len // block_size) * len(
        groups
    )  # blocks of one sequence that gets all it may
    tiny, crowded = rng.randint(2, 2 + longest), longest + rng.randint(0, longest)
    num_blocks = rng.choice([tiny, crowded, crowded, 4 * longest + 2])
    streams = [[rng.randrange(VOCAB) for _ in range(config.max_model_len)] for _ in range(2)]
    actions: list[Arrive | Cancel | Step] = []
    known: list[GenerateRequest] = []
    for number in range(rng.randint(2, 7)):
        actions += [Step()] * rng.choice([0, 0, 1, 2, 3, 5])
        request = _draw_request(rng, f"r{number}", config.max_model_len, streams)
        known.append(request)
        actions.append(Arrive(request))
        if rng.random() < 0.3:
            actions += [Step()] * rng.randint(0, 6)
            actions.append(_draw_cancel(rng, known))
    for _ in range(rng.choice([0, 0, 1, 2])):
        actions += [Step()] * rng.randint(0, 9)
        actions.append(_draw_cancel(rng, known))
    return Scenario(config, num_blocks, block_size, groups, tuple(actions))


_GROUP_SETS = [(True,), (True,), (True, False), (False,), (False, False), (True, False, False), (True, True)]


def _draw_request(
    rng: random.Random, request_id: str, max_model_len: int, streams: list[list[int]]
) -> GenerateRequest:
    length = rng.choice([rng.randint(1, 8), rng.randint(1, max_model_len), max_model_len * 2 // 3])
    tail = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 1, 2, 6]))]
    prompt = [*rng.choice(streams)[: max(0, length - len(tail))], *tail][:length]
    max_tokens = rng.choice([1, 2, rng.randint(1, 40), 40])
    return GenerateRequest(
        request_id=request_id,
        prompt=prompt,
        priority=rng.choice([0, 0, 0, 1, -1]),
        cache_salt=rng.choice(["", "", "other tenant"]),
        sampling=SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(1 << 64),
            ignore_eos=rng.random() < 0.7,
            stop_token_ids=tuple(rng.sample(range(2, VOCAB), rng.choice([0, 0, 0, 1, 3]))),
            logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=rng.choice([None, None, 0, 1]),
        ),
    )


def _draw_cancel(rng: random.Random, known: list[GenerateRequest]) -> Cancel:
    request = rng.choice(known)
    return Cancel(request.request_id, rng.choice([None, None, 0, rng.randrange(request.sampling.n)]))
