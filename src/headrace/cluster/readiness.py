"""Whether a gateway takes requests.

State    | enters it by                                          | new requests
---------|-------------------------------------------------------|-------------
STARTING | construction                                          | UNAVAILABLE
READY    | a worker that decodes is registered                   | accepted
DEAD     | the last of these is gone, or says it cannot start    | UNAVAILABLE
DRAINING | `drain`; never leaves it                              | UNAVAILABLE
"""

from __future__ import annotations

import asyncio
import enum

from headrace.cluster.registry import Member, Registry, reference
from headrace.engine.limits import RequestRefused
from headrace.protocol.messages import EngineInfo
from headrace.protocol.requests import ErrorCode


class GatewayState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class StartFailedError(Exception):
    """A worker's engine cannot be built as asked; the text is the engine's own."""


class Readiness:
    """The state of one gateway, and those who wait for it to change."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._was_ready = False
        self.is_draining = False
        self.start_failure: str | None = None
        """Why a worker said it cannot start, if one did since another last could."""
        self._changed = asyncio.Event()  # set, and replaced, whenever members or requests change

    @property
    def state(self) -> GatewayState:
        if self.is_draining:
            return GatewayState.DRAINING
        if any(member.info.role.decodes for member in self._registry.live()):
            return GatewayState.READY
        gone = self._was_ready or self.start_failure is not None
        return GatewayState.DEAD if gone else GatewayState.STARTING

    @property
    def takes_requests(self) -> bool:
        """Whether a new request would find a worker that is not on its way out."""
        decoding = (member for member in self._registry.live() if member.info.role.decodes)
        return not self.is_draining and any(member.takes_more for member in decoding)

    @property
    def info(self) -> EngineInfo | None:
        """What the engines have in common, read from any of them; also of the last one that is gone."""
        return reference(self._registry.live()) or reference(self._registry)

    def info_of(self, model: str) -> EngineInfo | None:
        """What the engines of one model have in common."""
        return reference(self._registry.live(model)) or reference(self._registry.known(model))

    def check(self, model: str) -> EngineInfo:
        """What the model's engines have in common. Raises RequestRefused where no request for it is taken."""
        if self.state is not GatewayState.READY:
            raise RequestRefused(ErrorCode.UNAVAILABLE, _WHY_UNAVAILABLE[self.state])
        info = self.info_of(model)
        if info is None or not self.serves(model):
            raise RequestRefused(
                ErrorCode.UNAVAILABLE, f"no worker of the model {model!r} serves now; try again later"
            )
        return info

    def serves(self, model: str) -> bool:
        """Whether a worker of the model decodes."""
        return any(member.info.role.decodes for member in self._registry.live(model))

    def member_up(self, member: Member) -> None:
        self._was_ready = self._was_ready or member.info.role.decodes
        self.start_failure = None
        self.tell_changed()

    def member_failed(self, message: str) -> None:
        """A worker says that it will not come."""
        self.start_failure = message
        self.tell_changed()

    def drain(self) -> None:
        """From now on nothing is taken."""
        self.is_draining = True
        self.tell_changed()

    async def wait_ready(self, workers: int) -> EngineInfo:
        """Wait for so many workers, one that decodes among them.

        Raises StartFailedError when one says that it cannot start.
        """
        while self.start_failure is None:
            live = list(self._registry.live())
            if len(live) >= workers and any(member.info.role.decodes for member in live):
                return live[0].info.engine
            await self._changed.wait()
        raise StartFailedError(self.start_failure)

    async def wait_changed(self) -> None:
        """Wait until a worker comes or goes, or a request ends."""
        await self._changed.wait()

    def tell_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


_WHY_UNAVAILABLE = {
    GatewayState.STARTING: "the model is being loaded; try again later",
    GatewayState.DRAINING: "the server is shutting down",
    GatewayState.DEAD: "no engine serves now; try again later",
}
