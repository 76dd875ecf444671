"""The phases of a sequence, and that nothing is kept of what has ended."""

from __future__ import annotations

from headrace.protocol.messages import SequenceTimes
from headrace.protocol.requests import Finish, FinishReason, SequenceOutput
from headrace.worker.times import Stopwatch

END = Finish(FinishReason.LENGTH)


def test_each_phase_is_told_at_the_ending_and_then_forgotten() -> None:
    watch = Stopwatch()
    watch.arrived("r", range(2), 1.0)
    watch.arrived("unscheduled", range(1), 2.0)
    watch.scheduled([("r", 0)], 4.0)
    assert watch.outputs([SequenceOutput("r", 0, [5], cached_tokens=0)], 7.0) == []
    watch.scheduled([("r", 1)], 7.0)
    ended = [
        SequenceOutput("r", 0, [6], finish=END),
        SequenceOutput("r", 1, finish=END),
        SequenceOutput("unscheduled", 0, finish=END),
    ]
    assert watch.outputs(ended, 12.0) == [SequenceTimes(3.0, 3.0, 5.0), SequenceTimes(6.0), SequenceTimes()]
    assert len(watch) == 0


def test_a_single_token_ends_prefill_and_all() -> None:
    watch = Stopwatch()
    watch.arrived("r", range(1), 0.0)
    watch.scheduled([("r", 0)], 0.0)
    assert watch.outputs([SequenceOutput("r", 0, [5], cached_tokens=0, finish=END)], 2.0) == [
        SequenceTimes(0.0, 2.0, 0.0)
    ]
