"""From the options of a command to a workload and a load; what does not go together is refused in words.

In: options, None where none was given. Out: what `Run` takes, and the words for it. The defaults are those of
`config.bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TypeVar

from headrace.bench.arrivals import Rate, arrivals
from headrace.bench.errors import BenchError
from headrace.bench.files import PromptFile, TraceWorkload, read_trace
from headrace.bench.run import Load
from headrace.bench.workload import (
    ConversationWorkload,
    Form,
    Lengths,
    RandomWorkload,
    Stream,
    Vocabulary,
    Workload,
    generator,
)
from headrace.config.bench import (
    DEFAULT_CONCURRENCY,
    DEFAULT_INPUT_LEN,
    DEFAULT_OUTPUT_LEN,
    DEFAULT_PREFIX_LEN,
    DEFAULT_PREFIXES,
    DEFAULT_REQUESTS,
    DEFAULT_THINK_TIME_S,
    DEFAULT_TURNS,
    Dataset,
    LoadOptions,
    WorkloadOptions,
)

T = TypeVar("T")

_SYNTHETIC = frozenset({"input_len", "output_len", "range_ratio", "vocab_size"})
_TAKES: dict[Dataset, frozenset[str]] = {
    "random": _SYNTHETIC,
    "shared-prefix": _SYNTHETIC | {"prefixes", "prefix_len"},
    "multi-turn": _SYNTHETIC | {"turns", "think_time"},
    "file": frozenset({"path", "output_len"}),
    "trace": frozenset({"path", "time_scale", "max_input_len", "max_output_len", "vocab_size"}),
}


def build_workload(options: WorkloadOptions, form: Form, seed: int) -> Workload:
    """Raises BenchError for options that the dataset does not take, and values that cannot be."""
    if seed < 0:
        raise BenchError(f"the seed must be at least 0, got {seed}")
    takes = _TAKES[options.dataset]
    for field in fields(options):
        if field.name != "dataset" and field.name not in takes and getattr(options, field.name) is not None:
            fitting = " or ".join(name for name, names in _TAKES.items() if field.name in names)
            raise BenchError(
                f"--{field.name.replace('_', '-')} has no meaning with --dataset {options.dataset}; "
                f"it is for {fitting}"
            )
    if options.dataset in ("file", "trace"):
        return _from_file(options, form, seed)
    spread = _or(options.range_ratio, 0.0)
    inputs = Lengths(_or(options.input_len, DEFAULT_INPUT_LEN), spread)
    outputs = Lengths(_or(options.output_len, DEFAULT_OUTPUT_LEN), spread)
    vocabulary = _vocabulary(options)
    if options.dataset == "multi-turn":
        turns = _or(options.turns, DEFAULT_TURNS)
        think_s = _or(options.think_time, DEFAULT_THINK_TIME_S)
        return ConversationWorkload(seed, form, inputs, outputs, turns, think_s, vocabulary)
    if options.dataset == "shared-prefix":
        prefixes = _or(options.prefixes, DEFAULT_PREFIXES)
        if prefixes < 1:
            raise BenchError(f"there must be at least 1 prefix, got {prefixes}")
        prefix_len = _or(options.prefix_len, DEFAULT_PREFIX_LEN)
        return RandomWorkload(seed, form, inputs, outputs, vocabulary, prefixes, prefix_len)
    return RandomWorkload(seed, form, inputs, outputs, vocabulary)


def _from_file(options: WorkloadOptions, form: Form, seed: int) -> Workload:
    if options.path is None:
        raise BenchError(f"--dataset {options.dataset} needs --path FILE")
    if options.dataset == "file":
        return PromptFile(options.path, form, _or(options.output_len, DEFAULT_OUTPUT_LEN))
    return TraceWorkload(
        options.path.name,
        read_trace(options.path),
        form,
        seed=seed,
        time_scale=_or(options.time_scale, 1.0),
        max_input_len=options.max_input_len,
        max_output_len=options.max_output_len,
        vocabulary=_vocabulary(options),
    )


def _vocabulary(options: WorkloadOptions) -> Vocabulary:
    return Vocabulary() if options.vocab_size is None else Vocabulary(options.vocab_size)


def build_load(options: LoadOptions, workload: Workload, seed: int) -> tuple[Load, str]:
    """The load, and what it is in words. Raises BenchError."""
    if options.rate is not None and options.ramp is not None:
        raise BenchError("--rate and --ramp are two answers to one question; give one of them")
    paced = options.rate is not None or options.ramp is not None
    if options.burstiness is not None and not paced:
        raise BenchError("--burstiness has no meaning without --rate or --ramp")
    requests = _requests(options, workload)
    concurrency = options.concurrency
    if paced:
        rate, words = _rate(options, requests)
        burstiness = _or(options.burstiness, 1.0)
        arrivals(rate, burstiness, generator(seed, Stream.ARRIVALS))  # says now what is wrong with them
        words += f", burstiness {burstiness:g}"

        def due() -> Iterator[float]:
            return arrivals(rate, burstiness, generator(seed, Stream.ARRIVALS))

        load = Load(due, concurrency, requests, options.duration, options.timeout)
    elif (times := workload.due()) is not None:
        words = "at the trace's times"
        load = Load(lambda: times, concurrency, requests, options.duration, options.timeout)
    else:
        concurrency = _or(concurrency, DEFAULT_CONCURRENCY)
        words = f"closed loop of {concurrency}"
        load = Load(None, concurrency, requests, options.duration, options.timeout)
    if load.due is not None and concurrency is not None:
        words += f", at most {concurrency} at once"
    if requests is not None:
        words += f", {requests} requests"
    if options.duration is not None:
        words += f", for {options.duration:g} s"
    return load, words


def _requests(options: LoadOptions, workload: Workload) -> int | None:
    requests = options.num_requests
    bounded = isinstance(workload, TraceWorkload)
    if requests is None and (bounded or options.duration is None):
        return _or(workload.requests, DEFAULT_REQUESTS)
    if bounded and requests is not None and workload.requests is not None and requests > workload.requests:
        raise BenchError(f"the trace has {workload.requests} requests, --num-requests is {requests}")
    return requests


def _rate(options: LoadOptions, requests: int | None) -> tuple[Rate, str]:
    if options.rate is not None:
        return Rate.constant(options.rate), f"{options.rate:g} requests/s"
    begin, _, end = (options.ramp or "").partition(":")
    try:
        ends = float(begin), float(end)
    except ValueError:
        raise BenchError(f"--ramp {options.ramp!r}: expected are two rates, such as 1:20") from None
    over_s = options.duration
    if over_s is None:
        if requests is None:
            raise BenchError("--ramp needs --duration or --num-requests, to know how long it takes")
        over_s = 2 * requests / max(sum(ends), 1e-9)
    return Rate.ramp(*ends, over_s), f"from {ends[0]:g} to {ends[1]:g} requests/s over {over_s:.1f} s"


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
