"""What `headrace serve` makes of its options for the HTTP side."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import headrace.api.service
import headrace.store
from headrace.cli.app import app
from headrace.config import EngineOptions, ServingOptions
from headrace.store import ModelFiles


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command with a service that only notes what it is given."""
    given: dict[str, Any] = {}

    class Noting:
        def __init__(self, files: ModelFiles, options: EngineOptions, bound: Any, **more: Any) -> None:
            bound.close()
            given.update(more, engine=options)

        async def run(self) -> None:
            pass

    files = ModelFiles(
        name="noted",
        directory=tmp_path,
        config={},
        generation_config={},
        tokenizer_config={},
        weights=(),
        tensors={},
        tokenizer=tmp_path,
        chat_template=None,
        revision="0",
    )
    monkeypatch.setattr(headrace.api.service, "Service", Noting)
    monkeypatch.setattr(headrace.store, "resolve", lambda model, progress: files)
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)

    def run(*options: str, environment: dict[str, str] | None = None) -> tuple[int, str, dict[str, Any]]:
        result = CliRunner().invoke(app, ["serve", "noted", "--port", "0", *options], env=environment)
        return result.exit_code, result.output, given

    return run


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def test_everything_is_open_and_bounded_where_nothing_is_said(serve: Any) -> None:
    code, _, given = serve()
    assert code == 0
    assert given["serving"] == ServingOptions()
    assert given["engine"].max_waiting == EngineOptions(directory="", served_name="").max_waiting


def test_options_reach_their_parts(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[keys]]\nname = "filed"\nkey = "third"\nconcurrent_requests = 2\n')
    code, output, given = serve(
        *("--api-key", "first", "--api-key", "second", "--api-keys", str(path)),
        *("--cors-origin", "https://a.example", "--max-body-size", "1MiB", "--max-prompt-characters", "99"),
        *("--max-waiting", "7", "--request-timeout", "2.5"),
    )
    assert code == 0, output
    serving = given["serving"]
    assert [key.name for key in serving.keys] == ["default", "default 2", "filed"]
    assert [key.digest for key in serving.keys] == [digest("first"), digest("second"), digest("third")]
    assert serving.keys[2].concurrent_requests == 2
    assert [key.operator for key in serving.keys] == [True, True, False]
    assert serving.cors_origins == ("https://a.example",)
    assert (serving.max_body_bytes, serving.max_prompt_characters) == (1 << 20, 99)
    assert serving.request_timeout_s == 2.5
    assert given["engine"].max_waiting == 7


def test_a_key_from_the_environment(serve: Any) -> None:
    _, _, given = serve(environment={"HEADRACE_API_KEY": "hidden"})
    assert [key.digest for key in given["serving"].keys] == [digest("hidden")]
    _, _, given = serve(environment={"HEADRACE_API_KEY": ""})
    assert given["serving"].keys == ()


def test_what_cannot_be_is_said_without_the_key(serve: Any, tmp_path: Path) -> None:
    for options in (
        ("--api-key", "se cret"),
        ("--api-key", "secret", "--api-key", "secret"),
        ("--api-keys", str(tmp_path / "none")),
    ):
        code, output, _ = serve(*options)
        assert code == 1, output
        assert "headrace: error:" in output
        assert "cret" not in output


def test_where_workers_of_other_machines_may_join_they_can_fetch_blocks(serve: Any, tmp_path: Path) -> None:
    home = {"HEADRACE_HOME": str(tmp_path)}
    for options, words in (
        (("--listen", "10.0.0.1:7000"), "with --listen 10.0.0.1:7000 they may join"),
        (("--listen", "0.0.0.0:7000", "--data-address", "0.0.0.0:0"), "no address to dial"),
        (("--prefill", "1", "--decode", "1", "--data-address", "127.0.0.1:7200"), "one port for 2 workers"),
        (("--listen", "nowhere"), "expected HOST:PORT"),
    ):
        code, output, _ = serve(*options, environment=home)
        assert code == 1, output
        assert words in " ".join(output.split())
    code, output, given = serve(
        *("--listen", "10.0.0.1:7000", "--data-address", "10.0.0.1:0"), environment=home
    )
    assert code == 0, output
    assert given["pools"].data_address == "10.0.0.1:0"
    code, _, given = serve("--listen", "127.0.0.1:7000", environment=home)
    assert code == 0
    assert given["pools"].data_address == "127.0.0.1:0"


def test_the_memory_of_all_workers_is_looked_at_before_any_starts(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.worker.memory.available_memory", lambda: 3 << 30)
    code, output, _ = serve("--kv-cache-memory", "1GiB", "--both", "3")
    assert code == 0, output
    code, output, _ = serve("--kv-cache-memory", "1GiB", "--both", "4")
    assert code == 1
    assert "out of memory: each of 4 workers needs" in output
    assert "--kv-cache-memory is 1 GiB" in output.replace("1.0", "1")
    code, output, _ = serve("--kv-cache-memory", "4GiB")
    assert code == 1
    assert "out of memory: the engine needs" in output


def test_workers_that_only_decode_need_others_that_prefill(serve: Any) -> None:
    code, output, _ = serve("--decode", "2")
    assert code == 1
    assert "would have to prefill everything themselves; add --prefill" in " ".join(output.split())
    code, output, _ = serve("--decode", "2", "--listen", "127.0.0.1:7000")  # they may join
    assert code == 0, output


def test_how_many_may_wait_is_an_option_of_a_joining_worker_too() -> None:
    assert "--max-waiting" in CliRunner().invoke(app, ["worker", "--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize(
    "workers", [("--both", "99999999999999999999"), ("--prefill", "200", "--both", "100")]
)
def test_more_workers_than_a_machine_can_have_are_refused_at_once(
    serve: Any, workers: tuple[str, ...]
) -> None:
    code, output, given = serve(*workers)
    assert code == 1
    assert "one server starts at most 256; let more join with headrace worker" in output
    assert not given
