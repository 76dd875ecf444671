"""Prompts that one worker has to compute yet, by class: which of them a more urgent newcomer would overtake.

In: prompts as they are given to the worker, and word of their first token or end. Out: tokens. Workers tell
how much they have queued, not whose it is. Lengths in tokens.
"""

from __future__ import annotations

from headrace.cluster.classes import RANKS, Band


class Outstanding:
    """Of one worker, in the order in which it got them."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[Band, int]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, leg_name: str, band: Band, tokens: int) -> None:
        """A prompt is on its way there."""
        self._prompts[leg_name] = band, tokens

    def drop(self, leg_name: str) -> None:
        """It is computed, or not wanted any more; idempotent."""
        self._prompts.pop(leg_name, None)

    def overtaken_by(self, band: Band, queued: float) -> float:
        """How much, at least, of what is `queued` there would be computed after a newcomer of this class.

        What is less urgent, but for one prompt, which may have been begun: a worker ends what it began. Which
        one is not known, so it is the longest; and of what is not less urgent all is still to be computed.
        """
        less = [tokens for other, tokens in self._prompts.values() if RANKS[other] > RANKS[band]]
        if len(less) < 2:
            return 0.0
        before = sum(tokens for other, tokens in self._prompts.values() if RANKS[other] <= RANKS[band])
        begun = max(less)
        return max(0.0, min(queued - before, float(sum(less))) - begun)
