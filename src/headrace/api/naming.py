"""Which model answers a request: the names that are served, and what stands behind each.

In: the name in a body, the session, what the body says of tokens. Out: the gateway's choice of a model, or an
error that lists what there is. A token id means something in one vocabulary only, so a body that has any is
never answered by a model of another one than its client had in mind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """The model for a request, and the smaller one that can take its place.

    A chat goes to a version that has a chat template, where one has. Raises a 400 where none has, and for
    token ids to a name whose versions have different vocabularies.
    """
    name = body.model or server.names[0]
    versions, silent = _versions(server, name, chat=chat)
    choice = server.gateway.versions.choose(name, session, unfit=silent, why="which has no chat template")
    if choice.why and not versions:
        raise ApiError(
            400,
            f"no version of {name!r} has a chat template; send a prompt to /v1/completions",
            param="messages",
        )
    field = _field_of_ids(body)
    if field is not None and choice.why:
        _check_one_vocabulary(server, name, versions, field)
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
        others, silent = _versions(server, name, chat=True)
        if silent and others:
            found.append(
                f"note: chats with {name} go to {', '.join(others)} alone; without a template: "
                f"{', '.join(silent)}"
            )
    return found


def model_of_text(server: Server, name: str | None, *, chat: bool = False) -> ServedModel:
    """Whose tokenizer and chat template a name stands for; of several versions that can take it, those of the
    heaviest."""
    check_model(server, name)
    name = name or server.names[0]
    versions, silent = _versions(server, name, chat=chat)
    _check_one_vocabulary(server, name, versions or silent, "model")
    shares = server.gateway.versions.of(name)
    return server.models[max(versions or silent, key=lambda model: shares[model])]


def _versions(server: Server, name: str, *, chat: bool) -> tuple[list[str], list[str]]:
    """The versions of a name that get requests: those that can take this one, and those that cannot, as they
    have no chat template."""
    shares = server.gateway.versions.of(name)
    drawn = [model for model, share in shares.items() if share > 0]
    silent = [model for model in drawn if chat and server.models[model].chat_template is None]
    return [model for model in drawn if model not in silent], silent


def _check_one_vocabulary(server: Server, name: str, versions: Sequence[str], field: str) -> None:
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
