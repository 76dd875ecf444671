"""`headrace status`, `explain` and `drain`: what a running server's cluster does, from outside."""

from __future__ import annotations

import http.client
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Annotated, Any

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.journeys import journey_lines

TIMEOUT_S = 10.0
WIDTH = 160
"""Characters of a line that goes into a file or a pipe, where COLUMNS does not say."""

Url = Annotated[str, typer.Option(help="The server's address.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="HEADRACE_API_KEY", help="Key to send.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_URL = "http://127.0.0.1:8000"


def status(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Show the workers of a running server: role, state, load, blocks."""
    with clear_errors():
        answer = ask(url, "/cluster", api_key, expects=("workers", "state", "open_sequences"))
        if as_json:
            print(json.dumps(answer, indent=2))
        else:
            _show_status(answer)


def explain(
    request: Annotated[
        str, typer.Argument(help="The id in the answer, or its X-Request-Id.", show_default=False)
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what happened to REQUEST: where it went and why, what was transferred, how it ended; or why it was
    refused."""
    with clear_errors():
        answer = ask(
            url,
            f"/cluster/requests/{_in_path('REQUEST', request)}",
            api_key,
            expects=("requests",),
        )
        if as_json:
            print(json.dumps(answer, indent=2))
            return
        for one in answer["requests"]:
            for line in journey_lines(one):
                print(line)


def drain(
    worker: Annotated[
        str, typer.Argument(help="The worker's name, as `status` shows it.", show_default=False)
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Let WORKER finish what it has, give it nothing new, and have it leave."""
    with clear_errors():
        path = f"/cluster/workers/{_in_path('WORKER', worker)}/drain"
        answer = ask(url, path, api_key, method="POST", expects=("open_sequences",))
        print(f"{worker} drains: {answer['open_sequences']} sequences to end", file=sys.stderr)


def _show_status(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=width_of_text())
    console.print(f"{answer['state']}, {answer['open_sequences']} sequences open", highlight=False)
    for line in [*queue_lines(answer.get("queue") or []), *attainment_lines(answer.get("slo") or {})]:
        console.print(line, highlight=False)
    table = Table(box=None, pad_edge=False)
    several = len({worker.get("model") for worker in answer["workers"]}) > 1
    for heading in ("WORKER", *["MODEL"] * several, "ROLE"):
        table.add_column(heading, no_wrap=True)
    table.add_column("STATE")
    for heading in ("RUN", "WAIT", "PREFILL", "HELD", "LEASED", "STEP", "HEARD"):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in answer["workers"]:
        blocks = worker["blocks"]
        table.add_row(
            escape(worker["id"]),
            *([escape(worker["model"])] if several else []),
            worker["role"],
            escape(worker["state"] + (f": {worker['why']}" if worker["why"] else "")),
            f"{worker['running']}",
            f"{worker['waiting']}",
            f"{worker['prefills']}",
            f"{blocks['held'] / blocks['total']:.0%}",
            f"{blocks['leased'] / blocks['total']:.0%}",
            f"{worker['step']}",
            f"{worker['heard_s_ago']:.1f} s",
        )
    console.print(table)


def width_of_text() -> int | None:
    """Columns of what is printed into a file or a pipe: by COLUMNS, or `WIDTH`; None: the terminal's."""
    if sys.stdout.isatty():
        return None
    said = os.environ.get("COLUMNS", "")
    return int(said) if said.isdecimal() and int(said) > 0 else WIDTH


def queue_lines(queues: list[dict[str, Any]]) -> list[str]:
    """Who waits at the gateway, a class a line."""
    return [
        f"  {one['requests']} of {one['class']} priority wait at the gateway, with {one['prompt_tokens']} "
        f"prompt tokens, the first for {one['longest_s']:.1f} s"
        for one in queues
        if one["requests"]
    ]


def attainment_lines(slo: dict[str, Any]) -> list[str]:
    """Which share of each class got what it may expect, and how fast its error budget is spent."""
    if "attainment" not in slo:
        return []
    judged = [one for one in slo["attainment"] if one["judged"]]
    first = f"SLO for {slo['objective']:.4g} of the requests of each class"
    if not judged:
        return [f"{first}: none in the last hour"]
    lines = [first]
    for band, which in dict.fromkeys((one["class"], one["slo"]) for one in judged):
        windows = [one for one in judged if (one["class"], one["slo"]) == (band, which)]
        said = "; ".join(
            f"{one['attainment']:.1%} of {one['judged']} in {one['window']}, burn rate {one['burn_rate']:.2g}"
            for one in windows
        )
        lines.append(f"  {band} {which.upper()} within {windows[0]['limit_s'] * 1e3:g} ms: {said}")
    return lines


def ask(
    url: str, path: str, api_key: str | None = None, *, method: str = "GET", expects: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The answer to one request, an object with at least the fields that it `expects`.

    Raises OSError with what the server said is wrong, or why it said nothing; ValueError for no address.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not _is_address(base):
        shown = url if url.isprintable() else repr(url)
        raise ValueError(f"--url {shown} is no address of HTTP; give http://HOST:PORT")
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("the API key (--api-key, HEADRACE_API_KEY) has characters that no header can carry")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(base + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise OSError(_said(error)) from None
    except urllib.error.URLError as error:
        raise OSError(f"no server answers at {base}: {error.reason}") from None
    except (http.client.HTTPException, ValueError, ConnectionError):
        raise OSError(f"what answers at {base} is no Headrace server; give its HTTP address") from None
    except TimeoutError:
        raise OSError(f"the server at {base} does not answer within {TIMEOUT_S:g} s") from None
    if not isinstance(found, dict) or not found.keys() >= set(expects):
        raise OSError(f"what answers at {base} is no Headrace server: {path} has no {expects[0]!r}")
    return found


def _is_address(url: str) -> bool:
    """Whether this can be asked for; what it is the address of is seen then."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    sound = url.isprintable() and not any(character.isspace() for character in url)
    return sound and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def _in_path(what: str, name: str) -> str:
    """A name as part of an address, whatever bytes it was given as. Raises ValueError for none."""
    if not name:
        raise ValueError(f"{what} is empty; headrace status shows what there is")
    return urllib.parse.quote(name, safe="", errors="surrogateescape")


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code}"
