"""`headrace bench` as a user runs it, against a scripted server."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from scripted_server import Asked, Reply, ScriptedServer, completion, serving_beside

from headrace.cli.app import app


def bench(server: ScriptedServer | str, *arguments: object) -> Result:
    url = server if isinstance(server, str) else server.url
    return CliRunner().invoke(app, ["bench", "--url", url, *map(str, arguments)], env={"COLUMNS": "120"})


def test_a_run_is_told_in_a_table_in_json_and_in_rows(tmp_path: Path) -> None:
    figures, rows = tmp_path / "f.json", tmp_path / "r.jsonl"
    with serving_beside(completion(first_s=0.01)) as server:
        result = bench(
            server, "--num-requests", 12, "--concurrency", 3, "--input-len", 7, "--output-len", 5,
            "--slo", "ttft=10s,tpot=10s", "--json", figures, "--save-requests", rows, "--seed", 3,
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "12 sent, 12 completed, 0 failed" in result.stdout
    assert "closed loop of 3, 12 requests" in result.stdout
    assert "100.0% and" in result.stdout
    found = json.loads(figures.read_text())
    assert (found["completed"], found["output_tokens"], found["input_tokens"], found["seed"]) == (
        12,
        60,
        84,
        3,
    )
    assert found["goodput"]["good"] == 12
    assert found["generator"]["cpu_s"] > 0
    assert found["ttft_s"]["p50"] >= 0.01
    assert len(rows.read_text().splitlines()) == 12
    assert server.most_open == 3


@pytest.mark.parametrize("dataset", ["shared-prefix", "multi-turn", "file", "mooncake", "azure"])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_workload_runs_on_both_endpoints(tmp_path: Path, dataset: str, endpoint: str) -> None:
    path = tmp_path / "data"
    options: list[object] = ["--output-len", 3, "--input-len", 5]
    if dataset == "file":
        path.write_text('{"prompt": "a b c", "max_tokens": 3}\n')
        options = ["--path", path]
    elif dataset == "mooncake":
        line = {"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}
        path.write_text("".join(json.dumps(line) + "\n" for _ in range(4)))
        options = ["--path", path, "--max-input-len", 500]
        dataset = "trace"
    elif dataset == "azure":
        path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "1.0,20,3\n" * 4)
        options = ["--path", path]
        dataset = "trace"
    elif dataset == "multi-turn":
        options += ["--think-time", 0]
    with serving_beside(completion()) as server:
        result = bench(server, "--dataset", dataset, "--endpoint", endpoint, "--num-requests", 4, *options)
    assert result.exit_code == 0, result.output
    assert "4 sent, 4 completed" in result.stdout
    assert [body["max_tokens"] for body in server.bodies] == [3] * 4
    assert all(("messages" in body) == (endpoint == "chat") for body in server.bodies)
    if "--max-input-len" in options:
        assert "note: 4 of 4 prompts were clipped to 500 tokens" in result.stdout


def test_a_rate_is_kept() -> None:
    with serving_beside(completion(first_s=0.3)) as server:
        began = time.perf_counter()
        result = bench(server, "--rate", 50, "--burstiness", "inf", "--num-requests", 20, "--output-len", 1)
        took_s = time.perf_counter() - began
    assert result.exit_code == 0, result.output
    assert "50 requests/s, burstiness inf, 20 requests" in result.stdout
    at = [asked.at for asked in server.asked if asked.method == "POST"]
    assert at[-1] - at[0] == pytest.approx(0.38, abs=0.1)
    assert took_s < 5


def test_a_run_of_failures_alone_exits_with_one() -> None:
    async def refuse(asked: Asked, reply: Reply) -> None:
        reply.json(429, {"error": {"message": "slow down"}})

    with serving_beside(refuse) as server:
        result = bench(server, "--num-requests", 3)
    assert result.exit_code == 1
    assert "http_429" in result.stdout and "slow down" in result.stdout


def test_fields_for_every_body() -> None:
    with serving_beside(completion()) as server:
        extra = '{"top_k": 5, "stream_options": null}'
        result = bench(server, "--num-requests", 1, "--extra-body", extra, "--no-ignore-eos")
    assert result.exit_code == 0, result.output
    (body,) = server.bodies
    assert body["top_k"] == 5 and "stream_options" not in body and "ignore_eos" not in body
    assert "one per chunk: the server sends no usage" in " ".join(result.stdout.split())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--turns", "2"], "--turns has no meaning"),
        (["--rate", "0"], "a rate must be above 0"),
        (["--slo", "ttft=200"], "expected is ttft, tpot or e2e"),
        (["--extra-body", "[1]"], "must be a JSON object"),
        (["--extra-body", "{"], "is not JSON"),
        (["--plot", "x.pdf"], "does not end in .png"),
        (["--json", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--set", "threads=1"], "--set has no meaning without --engine"),
        (["--engine", "m"], "--url has no meaning with --engine"),
        ([], "start a server there"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments: list[str], complaint: str) -> None:
    result = bench(f"http://127.0.0.1:{free_port()}", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("headrace: error: ") and complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_ctrl_c_reports_what_was_measured(tmp_path: Path) -> None:
    figures = tmp_path / "f.json"
    with serving_beside(completion(gap_s=0.02)) as server:
        command = [sys.executable, "-m", "headrace", "bench", "--url", server.url, "--duration", "60"]
        options = ["--concurrency", "2", "--output-len", "10000", "--json", str(figures)]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 30
            while server.open < 2:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert "stopped; this is what was measured so far" in output
    assert "2 sent, 0 completed, 0 failed, 2 cancelled" in output
    found = json.loads(figures.read_text())
    assert found["interrupted"] and found["ttft_s"]["count"] == 2
    assert found["output_tokens"] >= 8
