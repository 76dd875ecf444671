"""From a row of logits to a token: processors in a fixed order, then Gumbel-max.

Adding independent Gumbel noise to log-probabilities and taking the argmax samples from their softmax
(Gumbel 1954; Maddison et al., "A* Sampling", 2014). The noise of a token depends on (seed, position, token)
alone, so a request's choice at a position is the same whatever runs beside it, however often it was
preempted, and whether the position was reached by a draft or a decode.

Each row is processed by itself in NumPy, float64 once few candidates are left: a row's choice must not
depend on how many rows there are. Rows of a step without top-k, top-p and min-p are chosen together by the
compiled module, which gives the tokens that NumPy would. It knows nothing of models, batches or blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headrace.engine.plan import RowStart
from headrace.kernels.gumbel import choose_tokens, gumbel_noise
from headrace.protocol.requests import ErrorCode, RequestError, TokenLogprobs

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# With 53-bit uniforms a Gumbel variate lies in (-3.7, 36.8): what is further than this below the best
# scaled logit can never win, and its probability is below 1e-17.
_REACH = 41.0
_GREEDY_BELOW = 1e-5


class NoChoice(Exception):
    """No token can be chosen; `error` says whether the model is at fault or what the request forbids."""

    def __init__(self, code: ErrorCode, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.error = RequestError(code, message, field)


class RowSampler:
    """The sampling state of one running sequence: its parameters and what it has generated so far."""

    def __init__(self, start: RowStart, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._params = params = start.sampling
        self._seed = start.seed
        self._prompt_length = start.prompt_length
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
        self._stops = np.fromiter(sorted(stops), np.int64)
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._counts: npt.NDArray[np.float32] | None = None
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.float32)
            np.add.at(self._counts, np.asarray(start.tokens[start.prompt_length :], np.int64), 1.0)
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[np.asarray(start.tokens, np.int64)] = True
        self.wants_logprobs = params.logprobs
        self._temperature = 0.0 if params.temperature < _GREEDY_BELOW else params.temperature
        cut = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self._alone = self._temperature > 0 and cut
        """Whether candidates are sorted out first, which is not done for all rows at once."""

    def sample(self, logits: Row, position: int) -> int:
        """Choose the token at `position` of the sequence from raw logits [vocab], and remember it.

        Raises NoChoice where every token is forbidden, or the logits are not finite.
        """
        row = self._process(logits, position)
        best = int(np.argmax(row))
        if not math.isfinite(row[best]):
            raise self._no_choice(logits, position)
        token = best if self._temperature == 0 else self._draw(row, row[best], position)
        self._remember(token)
        return token

    def _remember(self, token: int) -> None:
        if self._counts is not None:
            self._counts[token] += 1.0
        if self._seen is not None:
            self._seen[token] = True

    def _no_choice(self, logits: Row, position: int) -> NoChoice:
        if math.isfinite(np.max(logits)):
            return NoChoice(
                ErrorCode.INVALID,
                f"no token is left to choose at position {position}: min_tokens forbids all of "
                "stop_token_ids until it is reached",
                "min_tokens",
            )
        return NoChoice(
            ErrorCode.INTERNAL,
            f"the model's logits at position {position} are not finite; its weights or dtype are at fault",
        )

    def _process(self, logits: Row, position: int) -> Row:
        """Penalties, logit bias and forbidden stops; the input is left as it is."""
        params = self._params
        forbid = self._stops.size > 0 and position - self._prompt_length < params.min_tokens
        if not (forbid or self._bias_ids.size or self._counts is not None or self._seen is not None):
            return logits
        row = logits.copy()
        if self._seen is not None:  # Keskar et al., "CTRL", 2019: shrink towards 0 what was seen
            scale = np.float32(params.repetition_penalty)
            seen = row[self._seen]
            row[self._seen] = np.where(seen > 0, seen / scale, seen * scale)
        if self._counts is not None:
            row -= np.float32(params.frequency_penalty) * self._counts
            row -= np.float32(params.presence_penalty) * (self._counts > 0)
        row[self._bias_ids] += self._bias
        if forbid:
            row[self._stops] = -np.inf
        return row

    def _draw(self, row: Row, best: np.float32, position: int) -> int:
        """Sample from softmax(row / temperature), cut down by top-k, top-p and min-p."""
        params = self._params
        scaled = (row - best) / np.float32(params.temperature)
        ids: Ids = np.flatnonzero(scaled > -_REACH)
        z = scaled[ids].astype(np.float64)
        if 0 < params.top_k < ids.size:
            keep = _largest(z, params.top_k)
            ids, z = ids[keep], z[keep]
        if params.top_p < 1.0:
            order = np.argsort(-z, kind="stable")
            mass = np.cumsum(np.exp(z[order]))
            # The smallest set whose mass reaches top_p: the first token that reaches it is kept.
            count = int(np.searchsorted(mass, params.top_p * mass[-1])) + 1
            keep = np.sort(order[:count])
            ids, z = ids[keep], z[keep]
        if params.min_p > 0.0:
            keep = np.flatnonzero(z >= math.log(params.min_p))
            ids, z = ids[keep], z[keep]
        return int(ids[np.argmax(z + gumbel_noise(self._seed, position, ids))])


def sample_rows(
    samplers: Sequence[RowSampler], logits: npt.NDArray[np.float32], positions: Sequence[int]
) -> list[int | NoChoice]:
    """What each sampler's `sample` gives or raises for its row of logits [rows, vocab], at its position."""
    tokens: list[int | NoChoice] = [0] * len(samplers)
    together = [i for i, sampler in enumerate(samplers) if not sampler._alone]
    if together:
        chosen = choose_tokens(
            [samplers[i]._process(logits[i], positions[i]) for i in together],
            [samplers[i]._temperature for i in together],
            [samplers[i]._seed for i in together],
            [positions[i] for i in together],
        )
        if chosen is None:
            together = []
        else:
            for i, token in zip(together, chosen, strict=True):
                if token < 0:
                    tokens[i] = samplers[i]._no_choice(logits[i], positions[i])
                    continue
                samplers[i]._remember(token)
                tokens[i] = token
    for i in set(range(len(samplers))).difference(together):
        try:
            tokens[i] = samplers[i].sample(logits[i], positions[i])
        except NoChoice as none:
            tokens[i] = none
    return tokens


def token_logprobs(logits: Row, token: int, alternatives: int) -> TokenLogprobs:
    """log softmax of raw logits [vocab] at `token`, with its rank and the most likely `alternatives`."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= math.log(np.exp(wide).sum())
    top = _largest(wide, alternatives) if alternatives else np.empty(0, np.int64)
    top = top[np.argsort(-wide[top], kind="stable")]
    rank = 1 + int(np.count_nonzero(logits > logits[token]))
    return TokenLogprobs(token, float(wide[token]), rank, [(int(i), float(wide[i])) for i in top])


def _largest(values: npt.NDArray[np.float64], count: int) -> Ids:
    """Indices of the `count` largest values, ascending; of equal ones the lowest indices."""
    threshold = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))
