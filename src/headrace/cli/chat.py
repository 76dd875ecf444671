"""`headrace chat`: a conversation in the terminal, with a server that runs or one of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.interrupts import INTERRUPTED, leaving_on

if TYPE_CHECKING:
    from headrace.bench.endpoint import OpenAIClient
    from headrace.cli.conversation import Conversation, Speed

HELP = """\
/system TEXT   set the system prompt; without TEXT, show it; with -, remove it
/save FILE     write the conversation to FILE
/load FILE     go on with the conversation in FILE
/stats         how fast the last answer came, and how long the context is
/reset         forget what was said; the system prompt stays
/help          this
/exit          leave, as does Ctrl-D; Ctrl-C stops an answer
A message that begins with / is written with two."""


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="What to serve: a name, a directory, a GGUF file, or a hub id. "
            "With --url, a name served there.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Talk to this OpenAI-compatible address.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADRACE_API_KEY", help="Key to send.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token.", show_default="the server's")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="the server's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats an answer.", show_default="random")] = None,
) -> None:
    """Talk to MODEL. Lines from a pipe are answered one after another. /help lists the commands."""
    with clear_errors(), leaving_on(signal.SIGTERM, signal.SIGHUP), contextlib.ExitStack() as stack:
        from headrace.bench.endpoint import OpenAIClient
        from headrace.cli.conversation import Conversation
        from headrace.cli.private_server import private_server

        if url is None and model is None:
            raise ValueError("give a MODEL to serve, or an address with --url")
        screen = Screen()
        if url is None and model is not None:
            url = stack.enter_context(private_server(model, screen.note))
            model, api_key = None, None
        client = OpenAIClient(str(url), api_key=api_key)
        runner = stack.enter_context(asyncio.Runner())
        stack.callback(client.close)
        name = runner.run(client.choose_model(model))
        fields = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        talk = Talk(client, runner, Conversation(name, system), fields, screen)
        screen.note(f"{name} at {client.origin}; /help lists the commands, Ctrl-D leaves")
        for line in screen.lines():
            if not talk.take(line) or screen.closed:
                break
    if screen.closed or (talk.failed and not screen.interactive):
        sys.exit(1)


class Screen:
    """Where lines come from and text goes to: a terminal with a prompt and notes, or a pipe with neither."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._colours = self.interactive and "NO_COLOR" not in os.environ
        self.closed = False
        """Nobody reads what is written any more."""

    def lines(self) -> Iterator[str]:
        """What the user enters, until Ctrl-D or the end of the pipe."""
        if not self.interactive:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):  # editing and history, where Python has them
            import readline  # noqa: F401
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                self.note("Ctrl-D leaves")

    def piece(self, text: str, reasoning: bool) -> None:
        """A piece of an answer, as it arrives."""
        if self.interactive:  # a model's output must not steer the terminal
            text = "".join(c for c in text if c.isprintable() or c in "\n\t")
        if reasoning and self._colours:
            text = f"\x1b[2m{text}\x1b[0m"
        self._write(text)

    def answer(self, text: str) -> None:
        """A line: the end of an answer, or what a command was asked for."""
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        if self.closed:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own last flush

    def note(self, text: str) -> None:
        """For people only; nothing in a pipe."""
        if self.interactive:
            print(f"\x1b[2m{text}\x1b[0m" if self._colours else text, file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        print(f"headrace: error: {text}", file=sys.stderr, flush=True)


class Talk:
    """Takes lines: commands, and messages to be answered."""

    def __init__(
        self,
        client: OpenAIClient,
        runner: asyncio.Runner,
        conversation: Conversation,
        fields: dict[str, float | int | None],
        screen: Screen,
    ) -> None:
        """`fields` of every request; those of None are left out."""
        self._client = client
        self._runner = runner
        self._conversation = conversation
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._screen = screen
        self._speed: Speed | None = None
        self.failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/reset": self._reset,
            "/help": lambda argument: self._screen.answer(HELP),
        }

    def take(self, line: str) -> bool:
        """Do what `line` asks; False to leave."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._say(line.removeprefix("/") if line.startswith("//") else line)
            return True
        name, _, argument = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        command = self._commands.get(name)
        if command is None:
            self._fail(f"there is no command {name}; /help lists them")
            return True
        try:
            command(argument.strip())
        except OSError as error:
            self._fail(f"{error.filename}: {error.strerror}" if error.strerror else str(error))
        except ValueError as error:
            self._fail(str(error))
        return True

    def _fail(self, text: str) -> None:
        self.failed = True
        self._screen.error(text)

    # ---- commands ------------------------------------------------------------------------------------

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        else:
            self._screen.answer(self._conversation.system or "there is no system prompt")

    def _save(self, file: str) -> None:
        if not file:
            raise ValueError("/save needs a FILE")
        self._conversation.save(Path(file).expanduser())
        self._screen.note(f"{len(self._conversation.messages)} messages saved")

    def _load(self, file: str) -> None:
        if not file:
            raise ValueError("/load needs a FILE")
        self._conversation.load(Path(file).expanduser())
        self._speed = None
        self._screen.note(f"{len(self._conversation.messages)} messages loaded")

    def _stats(self, argument: str) -> None:
        self._screen.answer(str(self._speed or "there is no answer yet"))

    def _reset(self, argument: str) -> None:
        self._conversation.messages.clear()
        self._speed = None

    # ---- answers -------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Send a message and show its answer. Of one that Ctrl-C stops, what has come is remembered."""
        from headrace.bench.errors import RequestFailed
        from headrace.bench.stream import StreamReader
        from headrace.cli.conversation import Said, Speed

        messages = self._conversation.messages
        messages.append(Said("user", text))
        body = {
            "model": self._conversation.model,
            "messages": self._conversation.for_request(),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }
        shown: list[str] = []

        def show(piece: str, reasoning: bool) -> None:
            if not reasoning:
                shown.append(piece)
            self._screen.piece(piece, reasoning)

        answer = StreamReader(show)
        try:
            self._runner.run(self._client.run("chat", body, answer))
        except RequestFailed as error:
            if shown:
                self._screen.answer("")
            self._fail(str(error))
        except KeyboardInterrupt:
            if not self._screen.interactive:
                sys.exit(INTERRUPTED)
            self._screen.answer("")
            self._screen.note("stopped")
        else:
            if not "".join(shown).endswith("\n"):
                self._screen.answer("")
        if shown:
            messages.append(Said("assistant", "".join(shown)))
            self._speed = Speed.of(answer)
        else:
            messages.pop()  # unanswered: as if it had not been said
