"""The load generator: drives a server or an engine, and says what a user would have felt.

In: a target, a workload, a load, a seed. Out: records of requests and their summary. It must not know how
requests are served; it never imports torch, and it measures what it costs itself.

    target = EndpointTarget(client, model, "completions")
    run = Run(target, RandomWorkload(...), Load(concurrency=8, requests=100))
    await run.run()
    summary = summarise(run.records, ...)
"""

from headrace.bench.arrivals import Rate, arrivals
from headrace.bench.endpoint import EndpointTarget, OpenAIClient, Route
from headrace.bench.errors import BenchError, Failure, FailureKind, RequestFailed
from headrace.bench.record import Record
from headrace.bench.run import Load, Run
from headrace.bench.summary import Distribution, Objectives, Summary, summarise
from headrace.bench.target import Answer, Target, Turn

__all__ = [
    "Answer",
    "BenchError",
    "Distribution",
    "EndpointTarget",
    "Failure",
    "FailureKind",
    "Load",
    "Objectives",
    "OpenAIClient",
    "Rate",
    "Record",
    "RequestFailed",
    "Route",
    "Run",
    "Summary",
    "Target",
    "Turn",
    "arrivals",
    "summarise",
]
