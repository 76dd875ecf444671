"""Which model answers a request: the names that are served, and what stands behind each.

In: the name in a body, the session, what the body says of tokens. Out: the gateway's choice of a model, or an
error that lists what there is. A token id means something in one vocabulary only, so a body that has any is
never answered by a model of another one than its client had in mind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from headrace.api.errors import ApiError
from headrace.api.schema import CompletionRequest, SamplingFields
from headrace.api.served import ServedModel, Server
from headrace.cluster.versions import Choice


def check_model(server: Server, name: str | None) -> None:
    """Raise a 404 for a model that is not served here."""
    if name is None or name in server.names:
        return
    are = "is" if len(server.names) == 1 else "are"
    raise ApiError(
        404,
        f"the model {name!r} does not exist here; {_listed(server.names)} {are} served",
        param="model",
        code="model_not_found",
    )


def choose(server: Server, body: SamplingFields, session: str, *, chat: bool) -> Choice:
    """The model for a request, and the smaller one that can take its place. Raises a 400 for token ids to a
    name whose versions have different vocabularies."""
    choice = server.gateway.versions.choose(body.model or server.names[0], session)
    field = _field_of_ids(body)
    if field is not None and choice.why:
        _check_one_vocabulary(server, choice.asked, field)
    if choice.smaller:
        model, smaller = server.models[choice.model], server.models[choice.smaller]
        lacks_template = chat and smaller.chat_template is None
        if lacks_template or (field is not None and model.vocabulary != smaller.vocabulary):
            return replace(choice, smaller="")
    return choice


def untalkative(server: Server) -> list[str]:
    """What cannot chat though its name can, in words for people."""
    found = []
    for name in server.names:
        shares = server.gateway.versions.of(name)
        silent = [model for model in shares if server.models[model].chat_template is None]
        if silent and len(silent) < len(shares):
            found.append(
                f"note: chats with {name} that fall to {', '.join(silent)} are refused: no chat template"
            )
    return found


def model_of_text(server: Server, name: str | None) -> ServedModel:
    """Whose tokenizer and chat template a name stands for; of several versions, those of the heaviest."""
    check_model(server, name)
    shares = server.gateway.versions.of(name or server.names[0])
    if len(shares) > 1:
        _check_one_vocabulary(server, name or server.names[0], "model")
    return server.models[max(shares, key=lambda model: shares[model])]


def _check_one_vocabulary(server: Server, name: str, field: str) -> None:
    versions = server.gateway.versions.of(name)
    if len({server.models[model].vocabulary for model in versions}) > 1:
        raise ApiError(
            400,
            f"{field}: the versions of {name!r} have different tokens; name {_listed(versions)} instead",
            param=field,
        )


def _field_of_ids(body: SamplingFields) -> str | None:
    """The field of a body in which there are token ids, if any."""
    if body.logit_bias:
        return "logit_bias"
    if body.stop_token_ids:
        return "stop_token_ids"
    given = body.prompt if isinstance(body, CompletionRequest) else ""
    return "prompt" if isinstance(given, list) and not isinstance(given[0], str) else None


def _listed(names: Iterable[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} and {last}" if others else last
