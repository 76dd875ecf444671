"""The instrument against a server whose delays are known: what it reads is what was there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from scripted_server import Asked, Reply, Script, completion, serving, token, usage

from headrace.bench.endpoint import EndpointTarget, OpenAIClient, Route
from headrace.bench.errors import BenchError, FailureKind
from headrace.bench.record import Counted
from headrace.bench.run import Load, Run
from headrace.bench.summary import Context, Summary, summarise
from headrace.bench.workload import ConversationWorkload, Form, Lengths, RandomWorkload, Workload

LATE_S = 0.025
"""How much later than it should a loaded machine may wake anyone."""


def measure(
    script: Script,
    load: Load,
    workload: Workload | None = None,
    *,
    route: Route = "completions",
    **options: Any,
) -> tuple[Run, Any]:
    """A run over loopback."""
    form = Form.TOKENS if route == "completions" else Form.MESSAGES
    workload = workload or RandomWorkload(0, form, Lengths(12), Lengths(9))

    async def main() -> tuple[Run, Any]:
        async with serving(script) as server:
            client = OpenAIClient(server.url)
            model = await client.choose_model(None)
            target = EndpointTarget(client, model, route, token_ids=workload.answers_needed, **options)
            run = Run(target, workload, load)
            await asyncio.wait_for(run.run(), 20)
            await target.close()
            return run, server

    return uvloop.run(main())


def summed(run: Run) -> Summary:
    context = Context("t", "w", "l", 0, "", False)
    return summarise(
        run.records, context, duration_s=run.elapsed_s, cpu_s=run.cpu_s, most_running=run.most_running
    )


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_known_delays_are_recovered(route: Route) -> None:
    script = completion(first_s=0.12, gap_s=0.03)
    run, _ = measure(script, Load(concurrency=3, requests=6), route=route)
    found = summed(run)
    assert (found.completed, found.short, found.output_tokens) == (6, 0, 54)
    assert found.ttft_s is not None and found.tpot_s is not None
    assert found.itl_s is not None and found.e2e_s is not None
    assert 0.12 <= found.ttft_s.p50 < 0.12 + LATE_S
    assert 0.03 - 0.002 <= found.itl_s.p50 < 0.03 + LATE_S
    assert 0.03 - 0.002 <= found.tpot_s.p50 < 0.03 + LATE_S
    assert 0.36 <= found.e2e_s.p50 < 0.36 + 9 * LATE_S
    assert found.itl_s.count == 6 * 8
    for record in run.records:
        assert record.first_byte_s is not None and record.sent_s is not None
        assert record.first_byte_s - record.sent_s <= (record.ttft_s or 0)


@pytest.mark.parametrize("how", ["ids", "text"])
def test_tokens_that_come_together_share_their_gap(how: str) -> None:
    extra = {"return_token_ids": True} if how == "ids" else {}
    run, _ = measure(
        completion(first_s=0.02, gap_s=0.09, per_chunk=3), Load(concurrency=1, requests=2), extra=extra
    )
    for record in run.records:
        assert record.sizes == [3, 3, 3]
        assert record.counted is (Counted.IDS if how == "ids" else Counted.TEXT)
        assert record.itl_s().tolist() == pytest.approx([0.03] * 6, abs=LATE_S / 3)
        assert record.tpot_s == pytest.approx(0.03, abs=LATE_S / 3)


def test_bodies_are_what_was_asked_and_repeat_with_the_seed() -> None:
    def bodies(seed: int) -> list[dict[str, Any]]:
        workload = RandomWorkload(seed, Form.TOKENS, Lengths(12, 0.5), Lengths(4))
        _, server = measure(completion(), Load(concurrency=1, requests=5), workload, extra={"top_k": 3})
        found: list[dict[str, Any]] = server.bodies
        return found

    first = bodies(1)
    assert first == bodies(1)
    assert first != bodies(2)
    assert {key: value for key, value in first[0].items() if key != "prompt"} == {
        "model": "scripted",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
        "max_tokens": 4,
        "top_k": 3,
    }


def test_fields_can_be_taken_out_and_samples_are_seeded() -> None:
    _, server = measure(
        completion(),
        Load(concurrency=1, requests=2),
        temperature=0.7,
        ignore_eos=False,
        extra={"stream_options": None},
    )
    for body in server.bodies:
        assert "ignore_eos" not in body and "stream_options" not in body
        assert isinstance(body["seed"], int)


def test_a_conversation_takes_up_the_servers_answers() -> None:
    talk = ConversationWorkload(0, Form.TOKENS, Lengths(5), Lengths(3), 3, 0.0)
    run, server = measure(completion(), Load(concurrency=1, requests=3), talk)
    prompts = [body["prompt"] for body in server.bodies]
    assert [len(prompt) for prompt in prompts] == [5, 13, 21]
    assert prompts[1][:8] == [*prompts[0], 1000, 1001, 1002]
    assert prompts[2][:16] == [*prompts[1], 1000, 1001, 1002]
    assert talk.notes() == []
    assert [record.input_tokens for record in run.records] == [5, 13, 21]

    chat = ConversationWorkload(0, Form.MESSAGES, Lengths(5), Lengths(3), 2, 0.0)
    _, server = measure(completion(), Load(concurrency=1, requests=2), chat, route="chat")
    messages = server.bodies[1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "xxx"


def test_a_closed_loop_never_exceeds_its_number_at_the_server() -> None:
    run, server = measure(completion(first_s=0.01, gap_s=0.001), Load(concurrency=4, requests=40))
    assert server.most_open == 4
    assert summed(run).completed == 40
    assert server.connections <= 5  # kept, with the one that asked for the models


def test_what_fails_is_counted_by_kind_and_the_rest_goes_on() -> None:
    answers: list[Callable[[Reply], object]] = [
        lambda reply: reply.json(429, {"error": {"message": "slow down"}}),
        lambda reply: (reply.begin(), reply.chunk(b"data: {broken\n\n"), reply.end()),
        lambda reply: (reply.begin(), reply.event(token()), reply.raw(b"0\r\n\r\n")),
        lambda reply: (reply.begin(), reply.event({"error": {"message": "lost"}}), reply.end()),
        lambda reply: (reply.begin(), reply.event(usage(3, 0)), reply.end()),
        lambda reply: (reply.begin(), reply.event(token()), reply.hang_up()),
        lambda reply: reply.whole(200, b"<html>", "text/html"),
    ]
    seen = iter(range(100))

    async def script(asked: Asked, reply: Reply) -> None:
        number = next(seen)
        if number < len(answers):
            answers[number](reply)
        elif number == len(answers):
            reply.begin()
            await asyncio.sleep(30)
        else:
            await completion(tokens=2)(asked, reply)

    run, _ = measure(script, Load(concurrency=1, requests=12, timeout_s=0.4))
    assert [record.failure.kind if record.failure else None for record in run.records] == [
        "http_429",
        FailureKind.MALFORMED,
        FailureKind.DISCONNECTED,
        FailureKind.REFUSED,
        FailureKind.EMPTY,
        FailureKind.DISCONNECTED,
        FailureKind.MALFORMED,
        FailureKind.TIMEOUT,
        None,
        None,
        None,
        None,
    ]
    found = summed(run)
    assert (found.failed, found.completed) == (8, 4)
    assert found.short == 4  # two tokens of nine


def test_its_own_cost_is_told() -> None:
    run, _ = measure(completion(tokens=400), Load(concurrency=8, requests=16))
    found = summed(run)
    chunks = 16 * 400
    assert sum(len(record.times) for record in run.records) == chunks
    assert found.generator.cpu_per_chunk_s * chunks == pytest.approx(run.cpu_s)
    assert found.generator.lag_s is not None and found.generator.lag_s.count == 16


# ---- before the run ----------------------------------------------------------------------------------


def choose(script: Script, wanted: str | None = None, **options: Any) -> str:
    async def main() -> str:
        async with serving(script, **options) as server:
            return await OpenAIClient(server.url).choose_model(wanted)

    return asyncio.run(main())


def test_the_first_model_is_taken_and_another_must_be_there() -> None:
    assert choose(completion(), model="m") == "m"
    assert choose(completion(), "m", model="m") == "m"
    with pytest.raises(BenchError, match="does not serve 'x'; it serves m"):
        choose(completion(), "x", model="m")


def answering(status: int, body: bytes, kind: str = "application/json") -> Script:
    async def script(asked: Asked, reply: Reply) -> None:
        reply.whole(status, body, kind)

    return script


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (answering(200, b"<html>", "text/html"), "answered 200 with text/html, which is not OpenAI's"),
        (answering(404, b"{}"), "answered 404 with application/json"),
        (answering(200, b'{"data": [{"name": "x"}]}'), "is not OpenAI's list of models"),
        (answering(200, b'{"data": []}'), "serves no model"),
        (answering(401, b'{"error": {"message": "bad key"}}'), "bad key.*--api-key"),
    ],
)
def test_an_address_that_is_not_openais_is_told_so(script: Script, complaint: str) -> None:
    with pytest.raises(BenchError, match=complaint):
        choose(script, model="")


def test_a_named_model_needs_no_list() -> None:
    assert choose(answering(404, b""), "m", model="") == "m"


def test_a_key_is_sent() -> None:
    async def main() -> None:
        async with serving(completion()) as server:
            await OpenAIClient(server.url + "/v1", api_key="secret").choose_model(None)
            assert server.asked[0].headers["authorization"] == "Bearer secret"
            assert server.asked[0].path == "/v1/models"

    asyncio.run(main())
