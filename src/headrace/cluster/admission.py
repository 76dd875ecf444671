"""Whether requests may come in: what workers would have to queue beyond their limits is refused at once.

Pure functions over what the registry knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from headrace.cluster.ledger import Accepted
from headrace.cluster.registry import Member
from headrace.engine.limits import RequestRefused
from headrace.protocol.requests import ErrorCode, GenerateRequest


def check_room(
    members: Iterable[Member],
    requests: Collection[GenerateRequest],
    waiting: Collection[Accepted],
    open_samples: int,
) -> None:
    """Raise RequestRefused where the workers cannot take all of the requests beside those that wait for one.

    INVALID for what would never fit, OVERLOADED for what does not fit now, UNAVAILABLE when all workers that
    decode are on their way out; the client is told `open_samples`.
    """
    homes = [member for member in members if member.info.role.decodes]
    wanted = sum(request.sampling.n for request in requests)
    most = sum(member.most_samples for member in homes)
    if wanted > most:
        message = f"{wanted} sequences are asked for at once, and the engine takes {most} at most"
        raise RequestRefused(ErrorCode.INVALID, message, "n")
    room = {member: member.room for member in homes if member.takes_more}
    if homes and not room:
        message = "all workers that decode are shutting down; try again later"
        raise RequestRefused(ErrorCode.UNAVAILABLE, message)
    for one in waiting:  # who was accepted before comes first
        roomiest = max(room, key=lambda m: room[m])
        room[roomiest] = max(0, room[roomiest] - len(one.samples))
    for request in requests:
        member = max(room, key=lambda m: room[m], default=None)
        if member is None or room[member] < request.sampling.n:
            raise RequestRefused(
                ErrorCode.OVERLOADED,
                f"{open_samples} sequences run or wait, {wanted} more are asked for, and the "
                f"limit is {most}; try again later",
            )
        room[member] -= request.sampling.n
