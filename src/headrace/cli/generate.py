"""`headrace generate`: prompts to texts without a server, in order, for people or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.options import (
    DEFAULT_KV_CACHE_MEMORY,
    DEFAULTS,
    BatchInvariant,
    DtypeOption,
    KvCacheMemory,
    MaxModelLen,
    MaxNumSeqs,
    Model,
    QuantizationOption,
    Threads,
)
from headrace.config import EngineOptions, parse_size


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help='A prompt a line; of a .jsonl file, a line is {"prompt": …} or {"messages": […]}. '
            "- is standard input.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is what a user says.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest output, in tokens.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest.", show_default="the model's, or 1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats an output.", show_default="random")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    dtype: DtypeOption = DEFAULTS.dtype,
    quantization: QuantizationOption = DEFAULTS.quantization,
    threads: Threads = DEFAULTS.threads,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs,
    kv_cache_memory: KvCacheMemory = DEFAULT_KV_CACHE_MEMORY,
    batch_invariant: BatchInvariant = False,
) -> None:
    """Continue prompts with MODEL and print the texts in the order of the prompts."""
    with clear_errors():
        from headrace.cli.models import PullProgress
        from headrace.store import resolve

        asked = [*_from_arguments(prompts or [], chat), *(_from_file(file, chat) if file is not None else ())]
        if not asked:
            raise ValueError("no prompt: give one, or a --file of them")
        with PullProgress() as progress:
            files = resolve(model, progress)
        options = EngineOptions(
            directory=str(files.directory),
            served_name=files.name,
            dtype=dtype,
            quantization=quantization,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(DEFAULTS.max_num_batched_tokens, max_num_seqs),
            kv_cache_memory=parse_size(kv_cache_memory),
            batch_invariant=batch_invariant,
        )
        import uvloop

        from headrace.api.batch import Batch, Result

        batch = Batch(files, options, max_tokens=max_tokens, temperature=temperature, seed=seed, say=_say)
        failed = 0

        def show(result: Result) -> None:
            nonlocal failed
            failed += result.error is not None
            if as_json:
                print(json.dumps(result.as_dict(), ensure_ascii=False), flush=True)
            elif result.error is not None:
                _say(f"prompt {result.index + 1}: {result.error}")
            elif len(asked) > 1:
                print(f"> {asked[result.index].label}\n{result.text}\n", flush=True)
            else:
                print(result.text, flush=True)

        with _progress_bar(len(asked)) as advance:
            uvloop.run(batch.run([one.prompt for one in asked], show, advance))
        if failed:
            sys.exit(1)


class _Asked:
    """A prompt, and how it is shown: text to continue, or messages to answer."""

    def __init__(self, prompt: str | list[dict[str, Any]]) -> None:
        self.prompt = prompt

    @property
    def label(self) -> str:
        text = self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content"))
        return text if len(text) <= 100 else text[:99] + "…"


def _from_arguments(texts: list[str], chat: bool) -> list[_Asked]:
    return [_Asked([{"role": "user", "content": text}] if chat else text) for text in texts]


def _from_file(path: Path, chat: bool) -> list[_Asked]:
    """Raises ValueError that names the line that cannot be read."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    lines = text.split("\n")  # only these end a line: a prompt may hold the others that Unicode knows
    if path.suffix != ".jsonl":
        return _from_arguments([line for line in lines if line.strip()], chat)
    found: list[_Asked] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        messages = entry.get("messages") if isinstance(entry, dict) else None
        if isinstance(prompt, str):
            found += _from_arguments([prompt], chat)
        elif isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            found.append(_Asked(messages))
        else:
            raise ValueError(f'{path}, line {number}: expected {{"prompt": "…"}} or {{"messages": […]}}')
    return found


@contextmanager
def _progress_bar(total: int) -> Iterator[Any]:
    """A bar on standard error, if that is a terminal and there is more than one prompt."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
    shown = console.is_terminal and total > 1
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(tokens_per_s: float) -> None:
            progress.update(task, advance=1, rate=f"{tokens_per_s:.0f} tokens/s")

        yield advance


def _say(line: str) -> None:
    print(f"headrace: {line}", file=sys.stderr, flush=True)
