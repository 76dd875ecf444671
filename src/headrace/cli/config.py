"""`headrace config`: what a cluster's file will do, and what a file may say."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.errors import clear_errors

if TYPE_CHECKING:
    from headrace.config.cluster import ClusterFile
    from headrace.config.words import Line

app = typer.Typer(name="config", help="Check a cluster's file; tell what it may say.", no_args_is_help=True)

MAX_WIDTH = 110
LATER = ": checked by this version; what is marked (later) acts in a later one"
LONG = 16
"""Characters of a value that leave the column of values as it is."""
NARROWEST = 30
"""Of the column of words, whatever the terminal's width."""
INVALID = 1


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="YAML file of a cluster.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY.PATH=VALUE",
            help="A field in place of what the file says; can be given again.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what FILE will do, and what this machine lacks for it. Exit code 1 where it is not valid."""
    with clear_errors():
        from headrace.api.lacks import Machine, faults, lacks
        from headrace.config.consistency import remarks
        from headrace.config.reading import ConfigError, read_cluster
        from headrace.config.words import in_words

        try:
            cluster = read_cluster(file, overrides or ())
            if wrong := [*faults(cluster, file), *_refused(cluster)]:
                raise ConfigError(str(file), wrong)
        except ConfigError as error:
            _tell_invalid(file, error.problems, as_json)
            sys.exit(INVALID)
        sections, noted, lacking = in_words(cluster), remarks(cluster), lacks(cluster, Machine.this(), file)
        if as_json:
            said = {name: [dataclasses.asdict(line) for line in lines] for name, lines in sections.items()}
            _print_json({"valid": True, "sections": said, "notes": noted, "machine_lacks": lacking})
            return
        print(f"{file} is valid.")
        _print_sections(sections)
        _print_list("To look at", noted)
        _print_list("What this machine lacks", lacking or ["nothing that can be seen from here"])


@app.command()
def schema() -> None:
    """Print the JSON Schema of a cluster's file, for editors and other checkers."""
    with clear_errors():
        from headrace.config.schema import schema_text

        print(schema_text(), end="")


def _refused(cluster: ClusterFile) -> list[str]:
    """What a worker would refuse of its engine, where the model is here to be asked."""
    from headrace.config.consistency import engine_options
    from headrace.store import ModelError, ModelFiles, look_for

    try:
        files = look_for(cluster.model) if cluster.model is not None else None
    except (ModelError, OSError):
        return []  # told of by what this machine lacks
    if not isinstance(files, ModelFiles):
        return []
    from headrace.execution.build import check_cache

    try:
        check_cache(engine_options(cluster, str(files.directory)))
    except (ValueError, ModelError, OSError) as error:
        return [f"engine: {error}"]
    return []


def _tell_invalid(file: Path, problems: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        _print_json({"valid": False, "problems": list(problems)})
        return
    print(f"{file} is not valid:", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)


def _print_json(found: dict[str, Any]) -> None:
    print(json.dumps(found, indent=2))


def _print_sections(sections: dict[str, list[Line]]) -> None:
    shown = {
        name: [(line.field.removeprefix(f"{name}."), _value(line), line) for line in lines]
        for name, lines in sections.items()
    }
    names = max(len(name) for rows in shown.values() for name, _, _ in rows)
    values = max(len(value) for rows in shown.values() for _, value, _ in rows if len(value) <= LONG)
    indent = " " * (names + values + 6)
    width = max(_width(), len(indent) + NARROWEST)
    for section, rows in shown.items():
        if not rows:
            continue
        print(f"\n{section}{'' if all(line.acts for _, _, line in rows) else LATER}")
        for name, value, line in rows:
            begin = f"  {name:{names}}  {value:{values}}  "
            says = line.says + " (later)" * (not line.acts) + " (default)" * line.default
            if len(begin) > len(indent):
                print(begin.rstrip())
                begin = indent
            first, *rest = textwrap.wrap(says, width - len(indent))
            print(begin + first)
            for text in rest:
                print(indent + text)


def _value(line: Line) -> str:
    if line.value is None:
        return "-"
    if isinstance(line.value, str):
        return line.value
    if isinstance(line.value, list):
        return f"{len(line.value)} steps" if len(line.value) != 1 else "1 step"
    if isinstance(line.value, float):
        return f"{line.value:g}"
    return json.dumps(line.value)


def _print_list(title: str, items: list[str]) -> None:
    if items:
        print(f"\n{title}")
    for item in items:
        print(textwrap.fill(item, _width(), initial_indent="  ", subsequent_indent="    "))


def _width() -> int:
    return min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
