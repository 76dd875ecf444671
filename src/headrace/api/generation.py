"""From a validated body and its prompts' tokens to choices of text: the part that all routes share.

In: prompts as token ids, the body's sampling fields. Out: for each wake-up, what was added to which choice.
A choice is one sample of one prompt: choice = prompt * n + sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.api.errors import ApiError
from headrace.api.naming import choose
from headrace.api.sample import Piece, Sample, TextOptions
from headrace.api.schema import SamplingFields
from headrace.api.served import ServedModel, Server
from headrace.api.terms import Terms
from headrace.cluster import OutputStream
from headrace.cluster.versions import Choice, StepDown
from headrace.protocol.requests import (
    SEED_LIMIT,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientLeftError(Exception):
    """The client closed its connection; nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request in the tokens of one model."""

    prompts: Sequence[list[int]]
    sampling: SamplingParams


class Generation:
    """One HTTP request's choices. Use it as a context manager: what has not ended is cancelled on leaving."""

    def __init__(
        self,
        server: Server,
        choice: Choice,
        prepared: Prepared,
        text: TextOptions,
        body: SamplingFields,
        terms: Terms,
    ) -> None:
        """Submits. Raises RequestRefused for what the gateway does not accept, StepDown for what the smaller
        model of `choice` is to serve, ApiError for what the caller may not have now."""
        self.id = terms.request_id
        self.model = server.models[choice.model]
        prompts, sampling = prepared.prompts, prepared.sampling
        self.prompts = prompts
        self.prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * len(prompts)
        self.cached_tokens = [0] * len(prompts)
        self._numbers = {f"{self.id}-{number}": number for number in range(len(prompts))}
        self._terms = terms
        self._expired = False
        prompt_tokens = sum(map(len, prompts))
        self._admission = terms.admit(prompt_tokens)
        try:
            self._stream: OutputStream = server.gateway.submit(
                *(
                    GenerateRequest(
                        request_id=request_id,
                        prompt=prompts[number],
                        sampling=sampling,
                        model=choice.model,
                        priority=body.priority,
                        cache_salt=body.cache_salt or "",
                        session=_session_of(body, terms),
                        tenant=terms.tenant,
                    )
                    for request_id, number in self._numbers.items()
                ),
                choice=choice,
            )
        except BaseException:
            self._admission.close(-prompt_tokens)  # nothing was computed
            raise
        # Made only now: until it was submitted, nobody has held n to a limit.
        self._n = self._stream.samples // len(prompts)
        self.samples = [Sample(self.model.tokenizer, text) for _ in range(self._stream.samples)]
        self.headers: dict[str, str] = {}
        """Of the answer: which model answers, where it is not the one that was asked for, and what was taken
        from the request, since too much else was to be served."""
        if choice.asked != choice.model:
            self.headers["X-Headrace-Model"] = _in_header(choice.model)
        if self._stream.degraded:
            self.headers["X-Headrace-Degraded"] = _in_header(", ".join(self._stream.degraded))
        self._unfinished = len(self.samples)
        self._timer = self._start_timer()

    def _start_timer(self) -> asyncio.TimerHandle | None:
        if self._terms.timeout_s is None:
            return None
        ends_s = self._terms.began_s + self._terms.timeout_s
        return asyncio.get_running_loop().call_at(ends_s, self._expire)

    def _expire(self) -> None:
        self._expired = True
        self._stream.close()  # cancels what runs and what waits; wakes whoever reads

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has not ended; whoever iterates gets ClientLeftError. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        self._stream.close()
        self._admission.close(sum(sample.tokens for sample in self.samples))

    def __aiter__(self) -> Generation:
        return self

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended."""
        return not self._unfinished

    async def __anext__(self) -> list[tuple[int, Piece]]:
        """Wait for outputs: the choices that went on, and by what.

        Raises ApiError when the engine ended one of them with an error or the time is up, ClientLeftError
        after `close`.
        """
        if not self._unfinished:
            raise StopAsyncIteration
        try:
            outputs = await anext(self._stream)
        except StopAsyncIteration:
            if self._expired:
                raise self._terms.expired() from None
            raise ClientLeftError from None
        return [taken for output in outputs if (taken := self._take(output)) is not None]

    def _take(self, output: SequenceOutput) -> tuple[int, Piece] | None:
        number = self._numbers[output.request_id]
        choice = number * self._n + output.index
        sample = self.samples[choice]
        if output.cached_tokens is not None and output.index == 0:
            self.cached_tokens[number] = output.cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[number] = output.prompt_logprobs
        if sample.finish_reason is not None:
            return None  # sent before the engine knew that a stop string had ended this sample
        finish = output.finish
        if finish is not None and finish.error is not None:
            raise ApiError.of(finish.error)
        if finish is not None and finish.reason is FinishReason.CANCELLED:
            raise ClientLeftError
        piece = sample.push(output)
        if sample.finish_reason is not None:
            self._unfinished -= 1
            if sample.stopped_here:
                self._stream.complete(output.request_id, output.index)
        return choice, piece

    def usage(self) -> dict[str, Any]:
        """Token counts so far, as OpenAI reports them."""
        prompt_tokens = sum(map(len, self.prompts))
        completion_tokens = sum(sample.tokens for sample in self.samples)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens)},
        }


async def generation_of(
    server: Server,
    body: SamplingFields,
    terms: Terms,
    prepare: Callable[[ServedModel], Awaitable[Prepared]],
    *,
    chat: bool = False,
) -> Generation:
    """Submit to the model that the body's name stands for now; `prepare` puts the request into its tokens.

    Under pressure the smaller model is asked where there is one, in its own tokens, if the prompt fits into
    its context. Raises what `Generation` does, but StepDown.
    """
    choice = choose(server, body, _session_of(body, terms), chat=chat)
    prepared, text = await prepare(server.models[choice.model]), text_options_of(body)
    try:
        return Generation(server, choice, prepared, text, body, terms)
    except StepDown as under:
        smaller = choice.stepped_down(under.pressure)
    in_its_tokens = await prepare(server.models[smaller.model])
    info = server.gateway.info_of(smaller.model)
    if info is not None and max(map(len, in_its_tokens.prompts)) < info.max_model_len:
        return Generation(server, smaller, in_its_tokens, text, body, terms)
    return Generation(server, replace(choice, smaller=""), prepared, text, body, terms)


def _session_of(body: SamplingFields, terms: Terms) -> str:
    return terms.session or body.user or ""


def _in_header(text: str) -> str:
    """A header is one line of ASCII, and a model's name may be anything."""
    return text.encode("unicode_escape").decode()


class Watcher:
    """Closes a generation as soon as its client closes the connection; from its making to `stop`."""

    def __init__(self, receive: Receive, generation: Generation) -> None:
        self._receive = receive
        self._generation = generation
        self._task = asyncio.create_task(self._watch(), name="api.client")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._generation.close()

    def stop(self) -> None:
        self._task.cancel()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def sampling_of(
    server: Server,
    model: ServedModel,
    body: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The engine's parameters for a body; where it says nothing, the model's recommendation, then OpenAI's.

    Limits that cannot matter are cut to what can: no output is longer than the context, and the top_k of a
    whole vocabulary, or vLLM's -1, is no top_k. A client without a seed gets one at random.
    """
    defaults = model.sampling_defaults

    def chosen(name: str, otherwise: float) -> Any:
        value = getattr(body, name)
        return value if value is not None else defaults.get(name, otherwise)

    info = server.gateway.info_of(model.name)
    longest, vocabulary = (info.max_model_len, info.vocab_size) if info is not None else (1, 1)
    return SamplingParams(
        max_tokens=min(max_tokens, longest),
        min_tokens=body.min_tokens or 0,
        n=1 if body.n is None else body.n,
        temperature=chosen("temperature", 1.0),
        top_p=chosen("top_p", 1.0),
        top_k=_top_k(chosen("top_k", 0), vocabulary),
        min_p=chosen("min_p", 0.0),
        repetition_penalty=chosen("repetition_penalty", 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        seed=server.seeds.getrandbits(64) if body.seed is None else body.seed % SEED_LIMIT,
        ignore_eos=body.ignore_eos,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _top_k(asked: int, vocabulary: int) -> int:
    return 0 if asked == -1 or asked >= vocabulary else asked


def text_options_of(body: SamplingFields) -> TextOptions:
    return TextOptions(
        stop=body.stop_strings,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens or 0,
        token_ids=body.return_token_ids,
    )
