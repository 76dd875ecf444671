"""The engine's core: which tokens of which request run in the next step, and in which KV blocks.

Python but for hashing, no torch, no clock, no I/O. It reads top to bottom: `limits`, `options`, `sequence`,
`queue`, `blocks`, `identity`, `cache`, `handoff`, `intake`, `plan`, `lifecycle`, `planner`, `scheduler`,
`engine`.
"""

from headrace.engine.cache import GroupSpec, KVCache
from headrace.engine.engine import Engine
from headrace.engine.identity import BlockHasher
from headrace.engine.limits import ModelLimits, RequestRefused, check_request, num_samples
from headrace.engine.options import SchedulerConfig
from headrace.engine.plan import Executor, RowStart, ScheduledRow, StepPlan, StepResult
from headrace.engine.scheduler import Scheduler

__all__ = [
    "BlockHasher",
    "Engine",
    "Executor",
    "GroupSpec",
    "KVCache",
    "ModelLimits",
    "RequestRefused",
    "RowStart",
    "ScheduledRow",
    "Scheduler",
    "SchedulerConfig",
    "StepPlan",
    "StepResult",
    "check_request",
    "num_samples",
]
