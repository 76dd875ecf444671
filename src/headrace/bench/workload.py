"""What is asked: sessions of one or more turns, made up from a seed.

In: lengths, numbers, a seed. Out: sessions, whose every turn depends on the seed, its place and the answers
before, never on time or on other sessions. Prompts are token ids for completions and words for chat, where
a word is about one token; what the server counted is what is reported.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.bench.errors import BenchError
from headrace.bench.target import Answer, Message, Turn
from headrace.bench.words import WORDS
from headrace.config.bench import DEFAULT_VOCAB_SIZE

PLAIN_IDS_FROM = 256
"""Control tokens and single bytes stand below in most vocabularies."""


class Form(enum.Enum):
    """How a prompt is written."""

    TOKENS = enum.auto()
    MESSAGES = enum.auto()


class Stream(enum.IntEnum):
    """Independent random streams of one seed."""

    ARRIVALS = 0
    SESSION = 1
    PREFIX = 2
    BLOCK = 3


def generator(seed: int, stream: Stream, index: int = 0) -> np.random.Generator:
    """The random numbers of the `index`-th thing of a kind."""
    return np.random.default_rng((seed, stream, index))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids that random prompts are made of, and the words that stand for them in chats."""

    size: int = DEFAULT_VOCAB_SIZE

    def __post_init__(self) -> None:
        if self.size < 2:
            raise BenchError(f"the vocabulary must have at least 2 token ids, got {self.size}")

    def tokens(self, random: np.random.Generator, count: int) -> list[int]:
        low = min(PLAIN_IDS_FROM, self.size // 2)
        ids: list[int] = random.integers(low, self.size, count).tolist()
        return ids


def as_text(tokens: Sequence[int]) -> str:
    """A text of as many words; equal ids give equal words."""
    return " ".join(WORDS[token % len(WORDS)] for token in tokens)


def message(role: str, tokens: Sequence[int]) -> Message:
    return {"role": role, "content": as_text(tokens)}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens, drawn evenly from `mean` * (1 - spread) to `mean` * (1 + spread)."""

    mean: int
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.mean < 1:
            raise BenchError(f"lengths must be at least 1 token, got {self.mean}")
        if not 0 <= self.spread < 1:
            raise BenchError(f"the range ratio must be at least 0 and below 1, got {self.spread:g}")

    def draw(self, random: np.random.Generator) -> int:
        low = max(1, math.floor(self.mean * (1 - self.spread)))
        return int(random.integers(low, math.floor(self.mean * (1 + self.spread)) + 1))

    def __str__(self) -> str:
        return f"{self.mean}" if self.spread == 0 else f"{self.mean} ± {100 * self.spread:g}%"


class Session(ABC):
    """One conversation, turn by turn."""

    left: int
    """Turns that `next` has not given out."""

    @abstractmethod
    def next(self, answer: Answer | None) -> Turn | None:
        """The next turn, given the answer to the one before; None when the session is over."""


class Single(Session):
    """A session of one turn."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.left = 1

    def next(self, answer: Answer | None) -> Turn | None:
        if self.left == 0:
            return None
        self.left = 0
        return self._turn


class Workload(ABC):
    """Where sessions come from."""

    description: str
    requests: int | None = None
    """How many requests there are; None is without end."""
    answers_needed: bool = False
    """Whether turns build on the token ids of earlier answers."""

    @abstractmethod
    def sessions(self, requests: int | None) -> Iterator[Session]:
        """Sessions of `requests` turns in all, each made when it is asked for; without end for None."""

    def due(self) -> Iterator[float] | None:
        """When each session is due in seconds from the start, for workloads that know; the first is 0."""
        return None

    def notes(self) -> list[str]:
        """What was done to the workload that a reader of the figures must know; complete after the run."""
        return []


def _count(requests: int | None) -> Iterator[int]:
    number = 0
    while requests is None or number < requests:
        yield number
        number += 1


@dataclass
class RandomWorkload(Workload):
    """Random prompts, after one of `prefixes` shared beginnings where there are any."""

    seed: int
    form: Form
    inputs: Lengths
    outputs: Lengths
    vocabulary: Vocabulary = Vocabulary()
    prefixes: int = 0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if self.prefixes < 0 or (self.prefixes > 0 and self.prefix_len < 1):
            raise BenchError("shared prefixes must be at least 1, each of at least 1 token")
        shared = (
            f", after one of {self.prefixes} prefixes of {self.prefix_len} tokens" if self.prefixes else ""
        )
        self.description = f"random, {self.inputs} tokens in and {self.outputs} out{shared}"
        self._shared = [
            self.vocabulary.tokens(generator(self.seed, Stream.PREFIX, i), self.prefix_len)
            for i in range(self.prefixes)
        ]

    def sessions(self, requests: int | None) -> Iterator[Session]:
        for number in _count(requests):
            yield Single(self._turn(number))

    def _turn(self, number: int) -> Turn:
        random = generator(self.seed, Stream.SESSION, number)
        prefix = self._shared[int(random.integers(self.prefixes))] if self.prefixes else []
        own = self.vocabulary.tokens(random, self.inputs.draw(random))
        max_tokens = self.outputs.draw(random)
        seed = int(random.integers(1 << 32))
        if self.form is Form.TOKENS:
            return Turn(prompt=prefix + own, max_tokens=max_tokens, seed=seed)
        system = [message("system", prefix)] if prefix else []
        return Turn(messages=[*system, message("user", own)], max_tokens=max_tokens, seed=seed)


@dataclass
class ConversationWorkload(Workload):
    """Sessions of several turns: each prompt is all that was said before and something new.

    The answers in it are the server's own. Where it does not tell their token ids, random ones of the same
    number stand in, and only what was prompted before can be found in a prefix cache.
    """

    seed: int
    form: Form
    inputs: Lengths
    outputs: Lengths
    turns: int
    think_s: float
    """Mean of the exponentially distributed time between an answer and the next turn."""
    vocabulary: Vocabulary = Vocabulary()
    replaced: int = 0
    """Answers whose token ids were not known."""

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise BenchError(f"a session must have at least 1 turn, got {self.turns}")
        if not 0 <= self.think_s < math.inf:
            raise BenchError(f"the think time must be at least 0 s, got {self.think_s:g}")
        self.answers_needed = self.form is Form.TOKENS
        self.description = (
            f"sessions of {self.turns} turns, {self.inputs} new tokens in and {self.outputs} out each, "
            f"{self.think_s:g} s apart in the mean"
        )

    def sessions(self, requests: int | None) -> Iterator[Session]:
        for number in _count(None if requests is None else math.ceil(requests / self.turns)):
            turns = self.turns if requests is None else min(self.turns, requests - number * self.turns)
            yield _Conversation(self, number, turns)

    def notes(self) -> list[str]:
        if not self.replaced:
            return []
        return [
            f"the server did not tell the token ids of {self.replaced} answers; random ones took their "
            "place in the prompts that followed"
        ]


class _Conversation(Session):
    def __init__(self, workload: ConversationWorkload, number: int, turns: int) -> None:
        self._workload = workload
        self._random = generator(workload.seed, Stream.SESSION, number)
        self.left = turns
        self._tokens: list[int] = []
        self._messages: list[Message] = []
        self._asked = 0

    def next(self, answer: Answer | None) -> Turn | None:
        if self.left == 0:
            return None
        self.left -= 1
        workload, random = self._workload, self._random
        stand_in = workload.vocabulary.tokens(
            random, self._asked
        )  # drawn either way: what follows is the same
        think_s = float(random.exponential(workload.think_s)) if answer is not None else 0.0
        new = workload.vocabulary.tokens(random, workload.inputs.draw(random))
        self._asked = workload.outputs.draw(random)
        seed = int(random.integers(1 << 32))
        if workload.form is Form.MESSAGES:
            if answer is not None:
                self._messages.append({"role": "assistant", "content": answer.text})
            self._messages.append(message("user", new))
            return Turn(messages=list(self._messages), max_tokens=self._asked, think_s=think_s, seed=seed)
        if answer is not None:
            workload.replaced += answer.token_ids is None
            self._tokens += stand_in if answer.token_ids is None else answer.token_ids
        self._tokens += new
        return Turn(prompt=list(self._tokens), max_tokens=self._asked, think_s=think_s, seed=seed)
