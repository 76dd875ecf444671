"""What the commands that answer over HTTP do alike: find the model, listen, serve until told to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli import STARTED_S
from headrace.cli.config_options import Configured
from headrace.cli.early import unwinding
from headrace.cli.http_options import HttpFlags, cluster_credentials, say
from headrace.cli.worker_options import check_join_address
from headrace.cluster.options import GatewayOptions
from headrace.config import EngineOptions

if TYPE_CHECKING:
    from headrace.api.workers import Pools
    from headrace.store import ModelFiles


def find_model(model: str, named_by: str = "") -> ModelFiles:
    """The files of a model, pulled if they are not here; `named_by` is a file that asks for it.

    Raises ModelError, OSError.
    """
    from headrace.cli.models import PullProgress
    from headrace.store import ModelNotFoundError, resolve

    try:
        with unwinding(), PullProgress() as progress:
            return resolve(model, progress)
    except ModelNotFoundError as error:
        if not named_by:
            raise
        raise ModelNotFoundError(
            f"{error}. {named_by} names it; name another with --set model=NAME"
        ) from None


@dataclass(frozen=True, slots=True)
class Source:
    """A model that is to be served."""

    model: str
    """A name, a directory, a GGUF file, or a hub id."""
    name: str | None
    """What clients ask for; None is the model's own."""
    named_by: str = ""
    """The file that asks for it, or nothing."""


def beside(said: Configured) -> list[Source]:
    """The models of the file's `models`."""
    named_by = str(said.path or "")
    return [Source(source, name, named_by) for name, source in said.file.sources().items()]


def serve_http(
    first: Source | None,
    others: Sequence[Source],
    engine: Callable[[ModelFiles, str], EngineOptions],
    pools: Pools,
    *,
    http: HttpFlags,
    gateway: GatewayOptions,
    names: Iterable[str],
    listen: str | None,
    credentials: Path | None,
) -> None:
    """Serve until a signal says otherwise; at `listen` workers of elsewhere join.

    Our own workers are of the `first` model, which is also meant where a client names none; without it, that
    is the first of `names`: those of the file, of models and of several versions.
    Raises what the user can mend, in words: see `clear_errors`.
    """
    from headrace.api.http import bind

    if listen is not None:
        check_join_address("--listen", listen)
    serving = http.serving()
    bound = bind(http.host, http.port)
    found = _find_all([*([first] if first is not None else []), *others])
    (name, files), *more = found.items()
    if taken := {*found} & {alias.name for alias in gateway.aliases}:
        raise ValueError(
            f"{taken.pop()!r} is the name of a model, and has versions; give one of the two another name"
        )
    if more and listen is None:
        raise ValueError(
            f"workers of {', '.join(each for each, _ in more)} could not join; add --listen HOST:PORT, or "
            "serve all of them with headrace gateway"
        )
    options = engine(files, name)
    import uvloop

    from headrace.api.service import Service
    from headrace.api.workers import Door
    from headrace.worker.memory import check_memory

    try:
        check_memory((tensor.shape for tensor in files.tensors.values()), options, len(pools.roles()))
    except MemoryError as error:
        raise ValueError(f"out of memory: {error}") from error
    service = Service(
        files,
        options,
        bound,
        serving=serving,
        drain_timeout_s=http.drain_timeout,
        pools=pools,
        door=Door(listen, cluster_credentials(credentials, make=True)) if listen is not None else None,
        gateway=gateway,
        others=dict(more),
        names=tuple(dict.fromkeys([*([name] if first is not None else []), *names, *found])),
        started_s=STARTED_S,
        say=say,
    )
    uvloop.run(service.run())


def _find_all(sources: Sequence[Source]) -> dict[str, ModelFiles]:
    """The files of each model, by the name that clients ask for. Raises ValueError for a name of two.

    What says no more than the name of one before it is that one: it is in the file for what is smaller.
    """
    found: dict[str, ModelFiles] = {}
    for source in sources:
        if source.model == source.name and source.name in found:
            continue
        files = find_model(source.model, source.named_by)
        name = source.name or files.name
        if name in found:
            raise ValueError(
                f"two models are called {name!r}: {found[name].directory} and {files.directory}; give one of "
                "them another name in the file, as in models: {NAME: {model: MODEL}}"
            )
        found[name] = files
    return found
