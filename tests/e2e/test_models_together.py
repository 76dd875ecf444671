"""Two models behind one gateway, each with a worker of its own process, by command and file."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from served import Served
from test_joined_cluster import HEADRACE, SMALL, command, free_address, home, wait_workers

__all__ = ["home"]  # the fixture

ROLES = ("one", "two")


@contextmanager
def worker_of(model: Path, name: str, address: str) -> Iterator[subprocess.Popen[str]]:
    """A worker of the model that clients call `name`."""
    options = ("--served-model-name", name, "--name", f"worker-of-{name}", "--join", address, *SMALL)
    process = subprocess.Popen([*HEADRACE, "worker", str(model), *options], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()


def ask(url: str, model: str, session: str = "") -> httpx.Response:
    body = {"model": model, "prompt": "The river", "max_tokens": 6, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, headers={"X-Session-ID": session}, timeout=60)


def test_two_models_and_a_name_for_both(
    smollm2_dir: Path, gemma3_dir: Path, home: Path, tmp_path: Path
) -> None:
    file, address = tmp_path / "cluster.yaml", free_address()
    content: dict[str, Any] = {
        "models": {"two": {"model": str(gemma3_dir)}, "both": {"versions": {"one": 1, "two": 1}}}
    }
    file.write_text(yaml.safe_dump(content))
    options = ("--served-model-name", "one", "--config", str(file), "--listen", address)
    with worker_of(smollm2_dir, "one", address), Served(smollm2_dir, *options, command="gateway") as served:
        url = served.url
        assert [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]] == ["one", "both", "two"]
        missing = ask(url, "two")
        assert missing.status_code == 503
        assert "no worker of the model 'two' serves now" in missing.text
        assert {ask(url, "both", str(n)).json()["model"] for n in range(4)} == {"one"}
        with worker_of(gemma3_dir, "two", address):
            wait_workers(url, 2)
            texts = {model: ask(url, model).json()["choices"][0]["text"] for model in ROLES}
            assert texts["one"] != texts["two"]
            drawn = [ask(url, "both", f"session {n}") for n in range(12)]
            for answer in drawn:
                model = answer.headers["X-Headrace-Model"]
                assert answer.json()["model"] == model
                assert answer.json()["choices"][0]["text"] == texts[model]
            assert {answer.json()["model"] for answer in drawn} == {*ROLES}
            way = command("explain", drawn[0].json()["id"], "--url", url)
            assert "version drawn" in way
            assert "both is one 50%, two 50%: by its session" in way
            assert "worker-of-two  two" in " ".join(command("status", "--url", url).split("\n")).replace(
                "   ", "  "
            )


def test_a_worker_of_another_model_is_told_which_there_are(
    smollm2_dir: Path, gemma3_dir: Path, home: Path
) -> None:
    address = free_address()
    gateway = subprocess.Popen(
        [*HEADRACE, "gateway", str(smollm2_dir), "--listen", address, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert gateway.stderr is not None
        deadline = time.monotonic() + 30
        while "workers may join" not in gateway.stderr.readline():
            assert time.monotonic() < deadline
        done = subprocess.run(
            [*HEADRACE, "worker", str(gemma3_dir), "--join", address, *SMALL],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert "its model revision is" in done.stderr
    finally:
        gateway.terminate()
        assert gateway.wait(20) == 0
        gateway.communicate()
