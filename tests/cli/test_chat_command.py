"""`headrace chat` in a pipe and in a terminal, against a scripted server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from scripted_server import Asked, Reply, Script, ScriptedServer, serving_beside, usage

from headrace.cli.app import app
from headrace.cli.private_server import ServerLostError, private_server


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


async def echo(asked: Asked, reply: Reply) -> None:
    """Says what it heard, word by word; without end for "forever", and an error for "wrong"."""
    heard = asked.body["messages"][-1]["content"]
    if heard == "wrong":
        reply.json(400, {"error": {"message": "the prompt is too long"}})
        return
    reply.begin()
    reply.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    words = ["You", *(f" {word}" for word in heard.split())]
    for word in words:
        reply.event(piece(word))
    while heard == "forever":
        reply.event(piece(" and on"))
        await reply.writer.drain()
        await asyncio.sleep(0.01)
    reply.event(piece("", "stop"))
    reply.event(usage(20, len(words)))
    reply.end()


def pipe(server: ScriptedServer, *lines: str, options: tuple[str, ...] = ()) -> Result:
    text = "".join(line + "\n" for line in lines)
    return CliRunner().invoke(app, ["chat", "--url", server.url, *options], input=text)


def test_lines_of_a_pipe_are_answered_in_order() -> None:
    with serving_beside(echo) as server:
        result = pipe(server, "said hi", "", "said more", options=("--max-tokens", "9", "--temperature", "0"))
    assert result.exit_code == 0, result.output
    assert result.stdout == "You said hi\nYou said more\n"
    assert result.stderr == ""
    first, second = server.bodies
    assert (first["max_tokens"], first["temperature"], first["model"]) == (9, 0, "scripted")
    assert "seed" not in first
    assert [message["content"] for message in second["messages"]] == ["said hi", "You said hi", "said more"]


def test_the_system_prompt_can_be_set_shown_and_removed() -> None:
    with serving_beside(echo) as server:
        lines = ("/system", "one", "/system Be kind.", "/system", "two", "/system -", "three")
        result = pipe(server, *lines, options=("--system", "Be brief."))
    assert result.stdout.splitlines() == ["Be brief.", "You one", "Be kind.", "You two", "You three"]
    begins = [body["messages"][0] for body in server.bodies]
    assert begins[0] == {"role": "system", "content": "Be brief."}
    assert begins[1] == {"role": "system", "content": "Be kind."}
    assert begins[2] == {"role": "user", "content": "one"}


def test_a_conversation_is_saved_loaded_and_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with serving_beside(echo) as server:
        assert pipe(server, "/system Be kind.", "hello", f"/save {path}").exit_code == 0
        result = pipe(server, f"/load {path}", "again", "/reset", "alone")
    assert result.exit_code == 0, result.output
    saved = json.loads(path.read_text())
    assert saved["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "You hello"},
    ]
    said = [[message["content"] for message in body["messages"]] for body in server.bodies[1:]]
    assert said == [["Be kind.", "hello", "You hello", "again"], ["Be kind.", "alone"]]


def test_stats_tell_of_the_last_answer() -> None:
    with serving_beside(echo) as server:
        result = pipe(server, "/stats", "one two", "/stats")
    before, answer, after = result.stdout.splitlines()
    assert (before, answer) == ("there is no answer yet", "You one two")
    assert re.fullmatch(
        r"first token after \d+ ms, 3 tokens( at [\d.]+ tokens/s)?; tokens in the context: 23", after
    )


def test_leaving_and_a_slash_of_ones_own() -> None:
    with serving_beside(echo) as server:
        result = pipe(server, "//etc is a directory", "/exit", "never said")
    assert result.exit_code == 0
    assert result.stdout == "You /etc is a directory\n"


def test_what_goes_wrong_is_said_and_the_talk_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}")
    lines = ("wrong", "/nope", "/save", f"/load {tmp_path}/bad", f"/load {tmp_path}/none", "fine")
    with serving_beside(echo) as server:
        result = pipe(server, *lines)
    assert result.exit_code == 1
    assert result.stdout == "You fine\n"
    complaints = result.stderr.splitlines()
    assert len(complaints) == 5
    for said, expected in zip(
        complaints,
        ("too long", "no command /nope", "needs a FILE", "no saved conversation", "No such file"),
        strict=True,
    ):
        assert said.startswith("headrace: error: ") and expected in said
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["fine"]


def test_neither_a_model_nor_an_address() -> None:
    result = CliRunner().invoke(app, ["chat"])
    assert result.exit_code == 1
    assert "give a MODEL to serve, or an address with --url" in result.stderr


# ---- in a terminal -----------------------------------------------------------------------------------


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master, self.process = master, process
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str, timeout_s: float = 20.0) -> str:
        """What was written until `text` came, which is forgotten; fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"{text!r} did not come; there is {self.seen!r}"
            if select.select([self.master], [], [], left_s)[0]:
                try:
                    data = os.read(self.master, 4096)
                except OSError:  # how Linux says that the other side is closed
                    data = b""
                assert data, f"the chat ended before {text!r}; there is {self.seen!r}"
                self.seen += data.decode()
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def interrupt(self, text: str, send: Callable[[], None]) -> None:
        """Interrupt what waits for input until `text` comes.

        More than once, since Python's readline does not notice a signal between its prompt and its wait.
        """
        deadline = time.monotonic() + 20.0
        while True:
            send()
            try:
                self.until(text, 0.5)
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise


@contextmanager
def terminal(script: Script) -> Iterator[tuple[Terminal, ScriptedServer]]:
    with serving_beside(script) as server:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace", "chat", "--url", server.url],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: _own_terminal(slave),
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        try:
            yield Terminal(master, process), server
        finally:
            process.kill()
            process.wait()
            os.close(master)


def _own_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal


def test_a_terminal() -> None:
    with terminal(echo) as (screen, server):
        assert "scripted at http://127.0.0.1" in screen.until("> ")
        screen.type("said hi\n")
        screen.until("You said hi")
        screen.until("> ")
        screen.type("forever\n")
        screen.until(" and on and on")
        screen.type("\x03")  # stops the answer, and nothing else
        screen.until("stopped")
        screen.until("> ")
        deadline = time.monotonic() + 5
        while server.open:
            assert time.monotonic() < deadline, "the server still answers what was stopped"
            time.sleep(0.01)
        screen.type("\x1b[31mred\n")
        screen.until("> ")
        kept = server.bodies[2]["messages"][3]["content"]
        assert kept.startswith("You forever and on and on")
        screen.interrupt("Ctrl-D leaves", lambda: screen.type("\x03"))
        screen.until("> ")
        screen.type("\x04")
        assert screen.process.wait(10) == 0


def test_an_answer_cannot_steer_the_terminal() -> None:
    async def rude(asked: Asked, reply: Reply) -> None:
        reply.begin()
        reply.event(piece("a\x1b]0;title\x07b\x9bc\n", "stop"))
        reply.end()

    with terminal(rude) as (screen, _):
        screen.until("> ")
        screen.type("hi\n")
        shown = screen.until("bc")
        assert "a]0;title" in shown and "\x07" not in shown and "\x9b" not in shown
        for _ in range(40):  # see Terminal.interrupt
            screen.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert screen.process.wait(0.5) == 143
                return
        raise AssertionError("SIGTERM did not end the chat within 20 s")


# ---- a server of one's own ---------------------------------------------------------------------------


def test_a_server_that_cannot_start_says_why() -> None:
    said: list[str] = []
    with (
        pytest.raises(ServerLostError, match="no model 'no-such-model'"),
        private_server("no-such-model", said.append),
    ):
        raise AssertionError("there can be no such server")
