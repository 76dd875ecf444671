"""The HTTP side's options as the command line spells them, shared by the commands that serve."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.early import unwinding
from headrace.cluster.options import SplitPolicy
from headrace.config import ApiKey, ServingOptions, format_size, parse_size, read_keys
from headrace.config.engine import MOST_REQUESTS, MOST_TOKENS
from headrace.config.serving import DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_PROMPT_CHARACTERS

if TYPE_CHECKING:
    from headrace.world.credentials import Credentials

API_KEY_VARIABLE = "HEADRACE_API_KEY"
DEFAULT_MAX_BODY_SIZE = format_size(DEFAULT_MAX_BODY_BYTES).replace(" ", "")

ServedModelName = Annotated[
    str | None,
    typer.Option("--served-model-name", help="Name that clients ask for.", show_default="the model's own"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpFlags:
    """What is served where, to whom, and how much of it."""

    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=API_KEY_VARIABLE,
            help="Ask clients for this key, or one of several; the variable keeps it from process lists.",
            show_default=False,
        ),
    ] = None
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TOML file of clients' keys with limits for each.", show_default=False
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Let pages of this origin call; * is all.", show_default=False),
    ] = None
    max_body_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest body of a request.")] = (
        DEFAULT_MAX_BODY_SIZE
    )
    max_prompt_characters: Annotated[
        int, typer.Option(min=1, help="Longest text of a request, before it is tokenised.")
    ] = DEFAULT_MAX_PROMPT_CHARACTERS
    request_timeout: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds that a request may take.", show_default="no limit"),
    ] = None
    served_model_name: ServedModelName = None
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have to end after SIGTERM.")
    ] = 30.0

    def serving(self) -> ServingOptions:
        """Raises ValueError, OSError for what cannot be."""
        keys = [
            ApiKey.of(key, _key_name(number), operator=True)
            for number, key in enumerate(self.api_key or (), 1)
        ]
        return ServingOptions(
            keys=(*keys, *(read_keys(self.api_keys) if self.api_keys is not None else ())),
            cors_origins=tuple(self.cors_origin or ()),
            max_body_bytes=parse_size(self.max_body_size),
            max_prompt_characters=self.max_prompt_characters,
            request_timeout_s=self.request_timeout,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFlags:
    """When prefill and decode are apart."""

    prompt_length_threshold: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_TOKENS, help="A prefill worker takes prompts with more uncached tokens than this."
        ),
    ] = SplitPolicy().prompt_length_threshold
    prefill_queue_max: Annotated[
        int, typer.Option(min=1, max=MOST_REQUESTS, help="Unless each prefill worker has so many already.")
    ] = SplitPolicy().prefill_queue_max

    def policy(self) -> SplitPolicy:
        return SplitPolicy(
            prompt_length_threshold=self.prompt_length_threshold, prefill_queue_max=self.prefill_queue_max
        )


CredentialsDirectory = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        metavar="DIR",
        help="Certificates and key of the cluster.",
        show_default="cluster/ under $HEADRACE_HOME or ~/.cache/headrace",
    ),
]


def cluster_credentials(directory: Path | None, *, make: bool) -> Credentials:
    """The cluster's credentials; with `make`, new ones where there are none yet.

    Raises CredentialsError, OSError.
    """
    from headrace.store.home import home_dir
    from headrace.world.credentials import load_credentials, make_credentials

    where = home_dir() / "cluster" if directory is None else directory
    with unwinding():
        return make_credentials(where) if make else load_credentials(where)


def _key_name(number: int) -> str:
    """What a key without a name of its own is called in errors."""
    return "default" if number == 1 else f"default {number}"


def say(line: str) -> None:
    """Tell people something on standard error; serving goes on where that cannot be."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # whoever read our words has left
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
    except OSError:  # a full disk takes none of our words now, and perhaps later
        pass
