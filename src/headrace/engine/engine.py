"""The step loop: schedule, submit, commit.

Plain, overlapped and pipelined execution are this one loop with another `executor.depth`.
"""

from __future__ import annotations

import asyncio
from collections import deque

from headrace.engine.intake import NO_PROGRESS
from headrace.engine.plan import Executor, StepPlan, StepResult
from headrace.engine.scheduler import Scheduler
from headrace.protocol.handoff import HandoffEvent, Leg
from headrace.protocol.requests import GenerateRequest, Progress, SequenceOutput


class Engine:
    """Runs requests on an executor. Not thread-safe; everything happens on one event loop."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        if executor.depth > scheduler.config.steps_in_flight:
            raise ValueError(
                f"the executor keeps {executor.depth} steps in flight and the scheduler reckons with "
                f"{scheduler.config.steps_in_flight}; raise steps_in_flight"
            )
        self.scheduler = scheduler
        self.executor = executor
        self._in_flight: deque[tuple[StepPlan, asyncio.Future[StepResult]]] = deque()
        self.last_step: tuple[StepPlan, StepResult] | None = None
        """What the last `step` committed, for those who measure."""
        self.last_started: list[tuple[str, int]] = []
        """Samples (request id, index) that the last `step` scheduled as it began, for the first time."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: not while all that is here waits for `begin` or `release`."""
        return bool(self._in_flight) or self.scheduler.has_work

    def add(
        self,
        request: GenerateRequest,
        progress: Progress = NO_PROGRESS,
        leg: Leg = Leg.WHOLE,
        offload_above: int = 0,
    ) -> None:
        """Accept a request, or one leg of its handoff; a refusal is its ending, in the next outputs."""
        self.scheduler.add(request, progress, leg, offload_above)

    def begin(self, request_id: str, imported: bool, generated: list[int]) -> None:
        """Let an import run: its blocks are filled, or (not `imported`) never will be."""
        self.scheduler.begin(request_id, imported, generated)

    def release(self, request_id: str) -> None:
        """Give back what is kept for the handoff of a leg; nothing touches its blocks any more."""
        self.scheduler.release(request_id)

    def take_handoffs(self) -> list[HandoffEvent]:
        """What has happened to legs since the last call, in order."""
        return self.scheduler.take_handoffs()

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it; unknown or ended ones are left alone."""
        self.scheduler.cancel(request_id, index)

    async def step(self) -> list[SequenceOutput]:
        """Fill the executor, wait for its oldest step, and return what has come of it.

        Cancelled while it waits, it loses nothing: the next call waits for the same step.
        """
        self.last_step = None
        while len(self._in_flight) < self.executor.depth:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self._in_flight.append((plan, self.executor.submit(plan)))
        self.last_started = self.scheduler.take_started()
        if self._in_flight:
            plan, future = self._in_flight[0]
            result = await asyncio.shield(future)
            self._in_flight.popleft()
            self.scheduler.commit(plan, result)
            self.last_step = (plan, result)
        return self.scheduler.take_outputs()
