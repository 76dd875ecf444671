"""`--config FILE` and `--set KEY.PATH=VALUE`, shared by the commands that a cluster's file speaks to.

The file's values become the defaults of those options that the command has, so that what the command line
says itself goes first; the other fields go to the gateway as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.errors import clear_errors
from headrace.cluster.options import GatewayOptions, SplitPolicy

if TYPE_CHECKING:
    from headrace.config.cluster import ClusterFile

_GIVEN = "headrace.config given"
_READ = "headrace.config read"


def _heard(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Read the file when both options are known: Click hands on each alone, in the order they were given."""
    given = context.meta.setdefault(_GIVEN, {})
    given[parameter.name] = value
    if len(given) < 2 or context.resilient_parsing:
        return value
    from headrace.config.reading import read_cluster

    with clear_errors():
        file = read_cluster(given["config"], given["overrides"] or ())
        context.meta[_READ] = file
        context.default_map = {**(context.default_map or {}), **file.as_options()}
    return value


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="A field of the cluster's file, in place of what it says; can be given again.",
        is_eager=True,
        callback=_heard,
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFlags:
    """The options; `Configured` has what they said."""

    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="YAML file of the cluster; options given here go before what it says.",
            is_eager=True,
            callback=_heard,
            show_default=False,
        ),
    ] = None
    overrides: Overrides = None


@dataclass(frozen=True, slots=True)
class Configured:
    """What a command's `--config` and `--set` say."""

    path: Path | None
    file: ClusterFile
    """Without either option, what holds where nothing is said."""

    @classmethod
    def of(cls, context: typer.Context) -> Configured:
        return cls(context.meta[_GIVEN]["config"], context.meta[_READ])

    def gateway(self, split: SplitPolicy) -> GatewayOptions:
        """What the gateway is asked to be, with the command line's own `split`; tells of what is odd."""
        from headrace.api.options import gateway_options
        from headrace.cli.http_options import say
        from headrace.config.consistency import remarks

        for remark in remarks(self.file):
            say(f"note: {remark}")
        return replace(gateway_options(self.file, self.path), split=split)

    def naming(self, model: str) -> str:
        """The file that names `model`, where the command line does not name another, else nothing."""
        return str(self.path) if self.path is not None and self.file.model == model else ""
