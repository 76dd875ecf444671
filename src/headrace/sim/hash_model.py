"""What stands in for a model's weights in proofs: which values positions write, and which token comes next.

A position writes one 64-bit value per KV group: a hash of its token, its position, its group and of *all*
values it can see. The next token is a hash of the last position's values. `HashExecutor` keeps the values
in KV blocks; `expected` computes the same from plain lists, and so states what a request must produce
whatever happens around it. It knows neither blocks nor steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.engine.cache import GroupSpec
from headrace.protocol.requests import GenerateRequest, SamplingParams, TokenLogprobs, sample_seed

_MASK = (1 << 64) - 1
_ODD = np.arange(1, 1 << 16, 2, dtype=np.uint64)


def _weights(first: int, end: int) -> NDArray[np.uint64]:
    """The odd number 2 p + 1 for each position p from `first` up to `end`."""
    return _ODD[first:end] if end <= len(_ODD) else np.arange(2 * first + 1, 2 * end, 2, dtype=np.uint64)


def _mix(x: int) -> int:
    """A bijection of 64-bit integers that avalanches: the finaliser of SplitMix64 (Steele et al., 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class HashModel:
    """What stands in for weights: everything but blocks that decides which token comes next."""

    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    groups: tuple[GroupSpec, ...] = (GroupSpec(),)

    def chain(
        self, group: int, start: int, tokens: Sequence[int], context: Sequence[int] | NDArray[np.uint64]
    ) -> list[int]:
        """Values of positions start, start + 1, … of `tokens`.

        `context` holds the values that position `start` sees before itself, oldest first, read from
        wherever the caller keeps them. Each value counts with a weight of its position, so that values
        in another order are another context.
        """
        window = self.groups[group].window
        oldest = start - len(context)
        before = np.asarray(context, dtype=np.uint64)
        digest = int(np.dot(before, _weights(oldest, start)))  # modulo 2^64, as all below
        values: list[int] = []
        for p, token in enumerate(tokens, start):
            value = _mix(_mix(digest ^ token) ^ (p << 16 | group))
            values.append(value)
            digest += value * (2 * p + 1)
            if window is not None and (gone := p - window + 1) >= 0:
                left = values[gone - start] if gone >= start else int(before[gone - oldest])
                digest -= left * (2 * gone + 1)
            digest &= _MASK
        return values

    def draw(self, values: Sequence[int]) -> int:
        """64 bits of chance that depend on the values of one position in every group."""
        state = 0
        for value in values:
            state = _mix(state ^ value)
        return state

    def next_token(self, values: Sequence[int], params: SamplingParams, seed: int, outputs: int) -> int:
        """The token after a position with these values, when `outputs` tokens have been generated."""
        bits = self.draw(values)
        if params.temperature > 0:
            bits = _mix(bits ^ seed)
        token = bits % self.vocab_size
        if outputs < params.min_tokens:
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
            for _ in range(self.vocab_size):
                if token not in stops:
                    break
                token = (token + 1) % self.vocab_size
        return token

    def logprobs(self, values: Sequence[int], token: int, top: int) -> TokenLogprobs:
        """Made up, but a function of everything a real one depends on."""
        bits = _mix(self.draw(values) ^ token)
        likely = [((bits + j) % self.vocab_size, -0.5 * (j + 1)) for j in range(top)]
        return TokenLogprobs(token, -(bits >> 40) / (1 << 20), 1 + bits % self.vocab_size, likely)


@dataclass(frozen=True, slots=True)
class Expected:
    """What one sample of a request produces when nothing disturbs it."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None
    values: list[list[int]]
    """Per KV group, what its blocks hold at positions 0 onwards; the last token is never computed."""


def expected(request: GenerateRequest, index: int, model: HashModel, max_model_len: int) -> Expected:
    """Sample `index` of a request, computed from plain lists: no blocks, no steps, no company."""
    params = request.sampling
    seed = sample_seed(params.seed, index)
    tokens = list(request.prompt)
    values = np.zeros((len(model.groups), max(max_model_len, len(tokens))), np.uint64)
    start = 0
    while True:
        for number, (group, row) in enumerate(zip(model.groups, values, strict=True)):
            seen = row[group.first_visible(start) : start]
            row[start : len(tokens)] = model.chain(number, start, tokens[start:], seen)
        start = len(tokens)
        outputs = start - len(request.prompt)
        token = model.next_token(values[:, start - 1].tolist(), params, seed, outputs)
        tokens.append(token)
        if token in params.stop_token_ids or (token in model.eos_token_ids and not params.ignore_eos):
            break
        if outputs + 1 == params.max_tokens or len(tokens) >= max_model_len:
            break
    rows = values[:, :start].tolist()

    def report(first: int, last: int, top: int | None) -> list[TokenLogprobs] | None:
        if top is None:
            return None
        columns = list(zip(*rows, strict=True))
        return [model.logprobs(columns[p - 1], tokens[p], top) for p in range(first, last)]

    length = len(request.prompt)
    return Expected(
        tokens[length:],
        report(length, len(tokens), params.logprobs),
        report(1, length, params.prompt_logprobs) if index == 0 else None,
        rows,
    )


def expected_tokens(request: GenerateRequest, index: int, model: HashModel, max_model_len: int) -> list[int]:
    """The output tokens of sample `index`, its stop token included, when nothing disturbs it."""
    return expected(request, index, model, max_model_len).tokens
