"""`headrace generate` and `headrace demo` with a real model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil

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
