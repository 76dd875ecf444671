"""`headrace models`: what is on this machine, what can be fetched, and getting rid of it again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from headrace.cli.interrupts import interruptible, leaving_on
from headrace.store import (
    BUILTIN_MODELS,
    ModelError,
    ModelFiles,
    PullListener,
    import_gguf,
    installed,
    models_dir,
    open_model,
    pull,
    remove,
    resolve,
)
from headrace.store.home import provenance

app = typer.Typer(name="models", help="Fetch, import, list and remove models.", no_args_is_help=True)


class PullProgress(PullListener):
    """Shows a pull or an import on stderr. Use it as a context manager around the call."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, visible=False)

    def __enter__(self) -> "PullProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def waiting(self) -> None:
        self._console.print("another process is installing this model; waiting for it")

    def stage(self, text: str) -> None:
        self._progress.reset(self._task, description=text, total=None, completed=0, visible=True)
        if not self._console.is_terminal:
            self._console.print(text)

    def progress(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


@app.command("list")
def list_models() -> None:
    """Show installed models and the built-in ones that can be pulled."""
    table = Table(box=None, pad_edge=False)
    for heading in ("NAME", "STATUS", "SIZE", "LICENCE", "WHAT"):
        table.add_column(heading, no_wrap=heading in ("NAME", "STATUS", "SIZE"), overflow="fold")
    there = installed()
    for name in sorted({*BUILTIN_MODELS, *there}):
        builtin = BUILTIN_MODELS.get(name)
        record = provenance(models_dir() / name) or {}
        licence = builtin.licence if builtin else str(record.get("licence") or "not stated")
        what = builtin.summary if builtin else f"from {record.get('source', 'an unknown source')}"
        status, size = "not pulled", ""
        if name in there:
            status, size = _status(models_dir() / name)
        elif builtin:
            size = f"{builtin.nbytes / 1e6:.0f} MB to fetch"
        table.add_row(name, status, size, licence, what)
    Console().print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name, directory, GGUF file or hub id.")]) -> None:
    """Say what a model is: architecture, shape, tokens, where it lies."""
    with _plain_errors(), PullProgress() as progress:
        model = resolve(name, progress)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _facts(model):
        table.add_row(label, value)
    Console().print(table)


@app.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(sorted(BUILTIN_MODELS))}, or a hub id.")],
) -> None:
    """Fetch a model, unless it is there already."""
    with _plain_errors(), PullProgress() as progress:
        directory = pull(name, progress) if name in BUILTIN_MODELS else resolve(name, progress).directory
    typer.echo(directory)


@app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="A GGUF file.", metavar="FILE.gguf")],
    name: Annotated[str | None, typer.Option(help="Name to keep it under.")] = None,
) -> None:
    """Convert a GGUF file to a model directory."""
    with _plain_errors(), PullProgress() as progress:
        if name in BUILTIN_MODELS:
            raise ModelError(f"{name} is the name of a built-in model; choose another one")
        directory = import_gguf(file, name, progress)
    typer.echo(directory)


@app.command("rm")
def remove_model(name: Annotated[str, typer.Argument(help="Name of an installed model.")]) -> None:
    """Delete an installed model."""
    with _plain_errors():
        remove(name)
    typer.echo(f"removed {name}")


def _status(directory: Path) -> tuple[str, str]:
    try:
        return "installed", f"{open_model(directory).nbytes / 1e6:.0f} MB"
    except ModelError:
        return "damaged", ""


def _facts(model: ModelFiles) -> Iterator[tuple[str, str]]:
    config = model.config
    record = provenance(model.directory) or {}
    yield "name", model.name
    yield "directory", str(model.directory)
    yield "architecture", model.model_type
    yield "layers", str(config["num_hidden_layers"])
    yield "hidden size", str(config["hidden_size"])
    heads = config["num_attention_heads"]
    yield "heads", f"{heads} query, {config.get('num_key_value_heads', heads)} key and value"
    yield "vocabulary", str(config["vocab_size"])
    yield "context", f"{config.get('max_position_embeddings', 'not stated')} tokens"
    yield "weights", f"{model.nbytes / 1e6:.0f} MB in {len(model.weights)} file(s)"
    yield "stored as", ", ".join(sorted({entry.dtype for entry in model.tensors.values()}))
    yield "ends at tokens", ", ".join(map(str, model.eos_token_ids)) or "none stated"
    yield "chat template", "yes" if model.chat_template else "none"
    yield "licence", str(record.get("licence") or "not stated")
    yield "revision", model.revision


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A `ModelError` becomes a message on stderr and exit status 1. SIGTERM leaves nothing behind."""

    with interruptible(), leaving_on(signal.SIGTERM):
        try:
            yield
        except ModelError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
