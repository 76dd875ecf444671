"""From a request, and how far it had come elsewhere, to its sequences; or the reason why there are none.

It knows the limits of an engine and the size of its cache, and nothing of what runs.
"""

from __future__ import annotations

from headrace.engine.cache import KVCache
from headrace.engine.limits import ModelLimits, RequestRefused, check_request, num_samples
from headrace.engine.options import SchedulerConfig
from headrace.engine.sequence import Handoff, Sequence, State
from headrace.protocol.handoff import Leg
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    Progress,
    RequestError,
    sample_seed,
)

NO_PROGRESS = Progress()
"""A request that nobody has worked on."""


def open_samples(request: GenerateRequest, progress: Progress, leg: Leg) -> list[int]:
    """The samples that are to be run. ValueError if there are none, or a leg lacks the first."""
    if leg is not Leg.WHOLE and 0 in progress.ended:
        raise ValueError(f"{leg.value} of request {request.request_id!r}: its sample 0 has ended")
    if leg is Leg.EXPORT:
        return [0]
    samples = [index for index in range(num_samples(request)) if index not in progress.ended]
    if not samples:
        raise ValueError(f"all samples of request {request.request_id!r} have ended")
    return samples


def refuse_what_cannot_run(
    request: GenerateRequest, progress: Progress, config: SchedulerConfig, cache: KVCache
) -> None:
    """Raise RequestRefused where a request can never be served, whatever else runs.

    ValueError, where `progress` says that a sample goes on whose tokens have ended it.
    """
    check_request(request, ModelLimits(config.max_model_len, config.vocab_size))
    n = request.sampling.n
    for index in (*progress.generated, *progress.ended):
        if not 0 <= index < n:
            raise RequestRefused(
                ErrorCode.INVALID, f"progress names sample {index} of a request for {n}", "progress"
            )
    for index, generated in progress.generated.items():
        if index not in progress.ended:
            check_generated(request, index, generated, config)
    longest = max((len(tokens) for tokens in progress.generated.values()), default=0)
    needed = cache.least_blocks(len(request.prompt) + longest)
    if needed > cache.pool.total:
        raise RequestRefused(
            ErrorCode.INVALID,
            f"the prompt needs {needed} KV blocks and the cache has {cache.pool.total} "
            f"(block_size {cache.block_size}); shorten it or raise --kv-cache-memory",
            "prompt",
        )


def check_generated(
    request: GenerateRequest, index: int, generated: list[int], config: SchedulerConfig
) -> None:
    """RequestRefused for tokens that are none of the model's, ValueError for such as end the sample."""
    for token in generated:
        if not 0 <= token < config.vocab_size:
            raise RequestRefused(
                ErrorCode.INVALID,
                f"generated token id {token} of sample {index} is outside the vocabulary of "
                f"{config.vocab_size}",
                "progress",
            )
    ended = stops_of(request, config).intersection(generated)
    if ended or len(request.prompt) + len(generated) >= limit_of(request, config):
        why = f"token {min(ended)} ends it" if ended else f"{len(generated)} tokens are all it may have"
        raise ValueError(f"sample {index} of request {request.request_id!r} has ended: {why}")


def stops_of(request: GenerateRequest, config: SchedulerConfig) -> frozenset[int]:
    """Tokens that end a sample of a request."""
    params = request.sampling
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else config.eos_token_ids)


def limit_of(request: GenerateRequest, config: SchedulerConfig) -> int:
    """Tokens, prompt included, at which a sample of a request ends."""
    return min(len(request.prompt) + request.sampling.max_tokens, config.max_model_len)


def new_sequences(
    request: GenerateRequest,
    progress: Progress,
    leg: Leg,
    offload_above: int,
    config: SchedulerConfig,
    root: bytes,
    arrival: int,
) -> list[Sequence]:
    """The sequences of a request that can run: the first leads, the others wait for it."""
    samples = open_samples(request, progress, leg)
    stops, limit = stops_of(request, config), limit_of(request, config)
    sequences = []
    for index in samples:
        generated = progress.generated.get(index, [])
        leads = index == samples[0]
        tokens = [*request.prompt, *generated]
        handoff = Handoff(leg, len(tokens), offload_above) if leads and leg is not Leg.WHOLE else None
        sequences.append(
            Sequence(
                request=request,
                index=index,
                rank=(request.priority, arrival, index),
                seed=sample_seed(request.sampling.seed, index),
                root=root,
                stops=stops,
                limit=limit,
                reach=len(tokens) if leg is Leg.EXPORT else limit - 1,
                leads=leads,
                handoff=handoff,
                state=State.WAITING if leads else State.BLOCKED,
                tokens=tokens,
                prompt_logprobs_done=progress.prompt_logprobs_told or bool(generated),
            )
        )
    return sequences


def shared_salt(request: GenerateRequest) -> str:
    """The salt of blocks that all requests of a tenant share."""
    return f"shared:{request.cache_salt}"


def out_of_blocks(sequence: Sequence, cache: KVCache) -> Finish:
    """The ending of a sequence that cannot go on though nobody else holds a block."""
    return Finish(
        FinishReason.ERROR,
        error=RequestError(
            ErrorCode.OUT_OF_BLOCKS,
            f"after {sequence.output_length} output tokens the sequence of {len(sequence.tokens)} needs "
            f"more than the {cache.pool.total} blocks of the KV cache (block_size {cache.block_size}); "
            "ask for fewer tokens or raise --kv-cache-memory",
            "max_tokens",
        ),
    )
