"""The outputs of what one client asked for, between the gateway that receives them and whoever reads them.

A reader takes everything that has arrived since it last looked, joined per sample. So a slow one gets longer
pieces less often, holds nobody up, and what waits for it is bounded by the tokens it may be sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from headrace.protocol.requests import FinishReason, SequenceOutput

SampleKey = tuple[str, int]
"""Request id and index of the sample."""


class OutputStream:
    """Iterates over lists of outputs, at most one for each sample in a list, until every sample has ended.

    One task reads. Leave it with `close` (or use it as a context manager): what has not ended is cancelled.
    """

    def __init__(
        self,
        samples: Iterable[SampleKey],
        cancel: Callable[[str, int | None, FinishReason], None],
        degraded: tuple[str, ...] = (),
    ) -> None:
        """`cancel` ends a request or one sample of it, to be counted as the reason it is given."""
        self.degraded = degraded
        """What was taken from what the client asked for, as `n=1`: too much else is to be served."""
        self._open = dict.fromkeys(samples)  # in order: what is left to end
        self.samples = len(self._open)
        """How many there are in all."""
        self._completed: set[SampleKey] = set()  # of those: what its reader has ended as complete
        self._arrived: dict[SampleKey, list[SequenceOutput]] = {}
        self._cancel = cancel
        self._reader: asyncio.Future[None] | None = None
        self._closed = False

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        while not self._arrived:
            if self._closed or not self._open:
                raise StopAsyncIteration
            if self._reader is not None:
                raise RuntimeError("two tasks read one stream of outputs")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        arrived, self._arrived = self._arrived, {}
        return [pieces[0] if len(pieces) == 1 else _join(pieces) for pieces in arrived.values()]

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it; its ending is among the outputs to come."""
        self._cancel(request_id, index, FinishReason.CANCELLED)

    def complete(self, request_id: str, index: int) -> None:
        """End a sample that its reader has found to be complete, as by a stop string; like `cancel` else."""
        self._completed.add((request_id, index))
        self._cancel(request_id, index, FinishReason.STOP)

    def close(self) -> None:
        """Stop reading: drop what has arrived, cancel what has neither ended nor is complete. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._arrived.clear()
        partly = {request_id for request_id, _ in self._completed}
        cancelled = ((r, index if r in partly else None) for r, index in self._open)
        for request_id, one in dict.fromkeys(cancelled):
            if (request_id, one) not in self._completed:
                self._cancel(request_id, one, FinishReason.CANCELLED)
        self._wake()

    # ---- for the gateway -----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def deliver(self, output: SequenceOutput) -> None:
        """Add an output; the gateway sees to it that a sample's ending is its last."""
        key = (output.request_id, output.index)
        if output.finish is not None:
            self._open.pop(key, None)
        if self._closed:
            return
        self._arrived.setdefault(key, []).append(output)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _join(pieces: list[SequenceOutput]) -> SequenceOutput:
    """One output that says what several in a row say."""
    first, last = pieces[0], pieces[-1]
    with_logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return SequenceOutput(
        first.request_id,
        first.index,
        tokens=[token for piece in pieces for token in piece.tokens],
        logprobs=[entry for entries in with_logprobs for entry in entries] if with_logprobs else None,
        prompt_logprobs=next((p.prompt_logprobs for p in pieces if p.prompt_logprobs is not None), None),
        cached_tokens=next((p.cached_tokens for p in pieces if p.cached_tokens is not None), None),
        finish=last.finish,
    )
