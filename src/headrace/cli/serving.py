"""What the commands that answer over HTTP do alike: find the model, listen, serve until told to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli import STARTED_S
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


def serve_http(
    model: str,
    engine: Callable[[ModelFiles], EngineOptions],
    pools: Pools,
    *,
    http: HttpFlags,
    gateway: GatewayOptions,
    named_by: str,
    listen: str | None,
    credentials: Path | None,
) -> None:
    """Serve until a signal says otherwise; at `listen` workers of elsewhere join.

    `named_by` is a file that asks for the model, or nothing.
    Raises what the user can mend, in words: see `clear_errors`.
    """
    from headrace.api.http import bind

    if listen is not None:
        check_join_address("--listen", listen)
    serving = http.serving()
    bound = bind(http.host, http.port)
    files = find_model(model, named_by)
    options = engine(files)
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
        started_s=STARTED_S,
        say=say,
    )
    uvloop.run(service.run())
