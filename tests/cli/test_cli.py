"""The command line without a model: help, errors in one line, files of prompts, sizes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.generate import _from_file
from headrace.config import EngineOptions, format_size, parse_size


def headrace(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        input=stdin,
    )


def test_help_names_every_command_and_option() -> None:
    top = headrace("--help")
    assert top.returncode == 0
    for command in ("serve", "generate", "models", "demo", "version"):
        assert command in top.stdout
    serve = headrace("serve", "--help").stdout
    for option in (
        *("--host", "--port", "--api-key", "--dtype", "--threads", "--max-model-len", "--max-num-seqs"),
        *("--max-num-batched-tokens", "--kv-cache-memory", "--block-size", "--no-prefix-caching"),
        *("--served-model-name", "--batch-invariant", "--drain-timeout"),
    ):
        assert option in serve, option
    generate = headrace("generate", "--help").stdout
    for option in ("--chat", "--max-tokens", "--temperature", "--seed", "--json", "--file"):
        assert option in generate, option


def test_the_command_line_starts_without_torch_and_http() -> None:
    code = (
        "import sys, headrace.cli.app; print([m for m in ('torch', 'fastapi', 'openai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_version() -> None:
    done = headrace("version")
    assert done.returncode == 0
    assert done.stdout.startswith("headrace 0.")
    assert "torch 2." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "no-such-model", "--port", "0"], "no model 'no-such-model'"),
        (["generate", "no-such-model", "hello"], "no model 'no-such-model'"),
        (["generate", "smollm2-135m"], "no prompt"),
        (["serve", "smollm2-135m", "--port", "0", "--kv-cache-memory", "much"], "'much' is not a size"),
        (["generate", "smollm2-135m", "--file", "/no/such/file"], "/no/such/file: No such file"),
        (["serve", "smollm2-135m", "--host", "no.such.host.invalid"], "cannot be resolved"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments: list[str], words: str) -> None:
    done = headrace(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("headrace: error: ")
    assert words in lines[0]


def test_a_port_in_use_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = headrace("serve", "no-such-model", "--port", str(port))
    assert done.returncode == 1
    expected = (
        f"headrace: error: cannot listen at 127.0.0.1:{port}: address already in use; choose another --port\n"
    )
    assert done.stderr == expected


def test_files_of_prompts(tmp_path: Path) -> None:
    plain = tmp_path / "prompts.txt"
    plain.write_text("one\n\n two\n", encoding="utf-8")
    assert [asked.prompt for asked in _from_file(plain, chat=False)] == ["one", " two"]
    assert _from_file(plain, chat=True)[0].prompt == [{"role": "user", "content": "one"}]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n', encoding="utf-8")
    assert [asked.label for asked in _from_file(lines, chat=False)] == ["a", "b"]
    lines.write_text('{"prompt": "a\u2028b\x85c"}\r\n', encoding="utf-8")
    assert [asked.prompt for asked in _from_file(lines, chat=False)] == ["a\u2028b\x85c"]
    plain.write_bytes(b"good\n\xff\xfe")
    with pytest.raises(ValueError, match=r"prompts\.txt: not UTF-8 text at byte 5"):
        _from_file(plain, chat=False)
    for broken, words in (
        ("{", "line 1: not JSON"),
        ("[]", "line 1: expected"),
        ('{"prompt": 5}', "expected"),
    ):
        lines.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            _from_file(lines, chat=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("2GiB", 2 << 30), ("1.5 gib", 3 << 29), ("64M", 64 << 20), ("1GB", 10**9), ("3kb", 3000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_sizes_are_written_short() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 2 << 30, 1 << 50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "2 GiB",
        "1024 TiB",
    ]
    for bad in ("", "GiB", "-1", "1 XB", "1e3"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(bad)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"threads": 0}, "threads must be at least 1"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"kv_cache_memory": 0}, "kv_cache_memory must be at least 1"),
        ({"max_num_seqs": 600}, "max_num_batched_tokens"),
    ],
)
def test_options_name_their_limits(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineOptions(directory="d", served_name="m", **wrong)  # type: ignore[arg-type]
