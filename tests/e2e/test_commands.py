"""`headrace generate` and `headrace demo` with a real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HEADRACE = [sys.executable, "-m", "headrace"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HEADRACE, *arguments], capture_output=True, text=True, timeout=100, input=stdin)


def test_generate_keeps_the_order_and_tells_what_it_could_not_do(smollm2_dir: Path) -> None:
    prompts = ["The capital of France is", "", "word " * 300, "1, 2, 3, 4,"]
    done = run(
        *("generate", str(smollm2_dir), "--json", "--temperature", "0", "--max-tokens", "6"),
        *("--max-model-len", "128", "--file", "-"),
        stdin="\n".join(prompts),
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["index"] for result in results] == [0, 1, 2]  # the empty line is no prompt
    assert "Paris" in results[0]["text"]
    assert "the limit is 127" in results[1]["error"]
    assert results[2]["text"].startswith(" 5,")
    assert results[2]["completion_tokens"] == 6
    assert done.returncode == 1
    assert done.stderr == ""


def test_generate_answers_a_chat_in_plain_text(smollm2_dir: Path) -> None:
    done = run("generate", str(smollm2_dir), "--chat", "What is the capital of France?", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"


def test_a_reader_that_leaves_ends_generate_without_words(smollm2_dir: Path) -> None:
    command = [*HEADRACE, "generate", str(smollm2_dir), "Hello", "World", "--max-tokens", "2", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_output_that_cannot_take_the_text_is_told(smollm2_dir: Path) -> None:
    done = subprocess.run(
        [*HEADRACE, "generate", str(smollm2_dir), "Ünïcödé", "b", "--max-tokens", "2"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1
    assert done.stderr == "headrace: error: the output takes only ascii; set PYTHONIOENCODING=utf-8\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_ended_takes_its_server_along(smollm2_dir: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*HEADRACE, "demo", str(smollm2_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while len(children := parent.children(recursive=True)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    assert len(children) >= 2, "the server and its engine"
    process.send_signal(number)
    process.wait(timeout=40)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_ctrl_c_ends_generate_cleanly(smollm2_dir: Path) -> None:
    process = subprocess.Popen(
        [*HEADRACE, "generate", str(smollm2_dir), "Once", "--max-tokens", "8000", "--temperature", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    parent = psutil.Process(process.pid)
    while not (children := parent.children()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (out, err) == ("", "headrace: interrupted\n")
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_the_demo_shows_answers_and_their_speed(smollm2_dir: Path) -> None:
    done = run("demo", str(smollm2_dir), "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    assert "12 times 12" in done.stdout
    for words in (
        "TTFT ms",
        "TPOT ms",
        "TOKENS/S",
        "chat, streamed",
        "completion, streamed",
        "8 chats at once",
    ):
        assert words in done.stdout
