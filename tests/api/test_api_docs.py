"""docs/api.md against the code: fields with type and default, routes, options and the table of errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_house import ApiHouse
from pydantic import BaseModel

from headrace.api.access import OPEN_PATHS
from headrace.api.answers import ERROR_MEANINGS
from headrace.api.bodies import BODY_GAP_S
from headrace.api.idempotency import MAX_KEY_CHARACTERS, Limits
from headrace.api.origins import EXPOSED_HEADERS, METHODS
from headrace.api.schema import (
    MAX_DETOKENIZED,
    MAX_PROMPTS,
    MAX_SALT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_TIMEOUT_S,
    ROLES,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    NotServed,
    SamplingFields,
    TokenizeRequest,
)
from headrace.config.serving import DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_PROMPT_CHARACTERS, ApiKey

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
REFUSED = NotServed.__metadata__[-1].json_schema["enum"]


def section(title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    assert found is not None, f"docs/api.md has no section {title!r}"
    return found[1]


def rows(title: str) -> dict[str, list[str]]:
    """The cells of each row of the section's table, by the name in the first."""
    table = [line for line in section(title).splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in table]
    return {name.strip("`"): rest for name, *rest in cells}


def types_of(field: dict[str, Any]) -> set[str]:
    """JSON types of a field, null aside."""
    if "anyOf" in field:
        return set().union(*map(types_of, field["anyOf"]))
    return {"object" if "$ref" in field else field["type"]} - {"null"}


def fields_of(model: type[BaseModel], *without: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Served fields of a model, apart from those of other models."""
    properties = model.model_json_schema()["properties"]
    left_out = {name for other in without for name in other.model_fields}
    return {
        name: field
        for name, field in properties.items()
        if name not in left_out and field.get("enum") != REFUSED
    }


@pytest.mark.parametrize(
    ("title", "model", "without"),
    [
        ("Fields of both", SamplingFields, ()),
        ("POST /v1/chat/completions", ChatCompletionRequest, (SamplingFields,)),
        ("POST /v1/completions", CompletionRequest, (SamplingFields,)),
        ("POST /tokenize", TokenizeRequest, ()),
        ("POST /detokenize", DetokenizeRequest, ()),
    ],
)
def test_the_tables_of_fields_are_the_fields(
    title: str, model: type[BaseModel], without: tuple[type[BaseModel], ...]
) -> None:
    told, fields = rows(title), fields_of(model, *without)
    assert told.keys() == fields.keys()
    for name, field in fields.items():
        kinds, default, *_ = told[name]
        assert set(kinds.split(" or ")) == types_of(field), name
        if model.model_fields[name].is_required():
            assert default == "required", name
        elif field.get("default") is not None:
            assert default == json.dumps(field["default"]), name
        else:
            assert default != "required", name


def test_what_is_refused_by_name_is_listed() -> None:
    models = (ChatCompletionRequest, CompletionRequest, TokenizeRequest)
    refused = {
        name
        for model in models
        for name, field in model.model_json_schema()["properties"].items()
        if field.get("enum") == REFUSED
    }
    assert refused == set(re.findall(r"`(\w+)`", section("Refused by name").split(":\n")[1].split(".")[0]))


def test_every_route_is_told(shared_house: ApiHouse) -> None:
    paths = httpx.get(f"{shared_house.url}/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            assert f"{method.upper()} {path}" in TEXT
    for path in OPEN_PATHS:
        assert f"`{path}`" in section("Keys")


def test_every_error_is_told() -> None:
    assert {int(status) for status in rows("Errors")} == set(ERROR_MEANINGS)


def test_the_limits_are_the_limits() -> None:
    stop = rows("Fields of both")["stop"][2]
    assert str(MAX_STOP_STRINGS) in stop and str(MAX_STOP_CHARACTERS) in stop
    assert str(MAX_TIMEOUT_S) in rows("Fields of both")["timeout"][2]
    assert str(MAX_SALT_CHARACTERS) in rows("Fields of both")["cache_salt"][2]
    assert str(MAX_PROMPTS) in rows("POST /v1/completions")["prompt"][2]
    assert str(MAX_DETOKENIZED) in rows("POST /detokenize")["tokens"][2]
    for role in ROLES:
        assert f"`{role}`" in rows("POST /v1/chat/completions")["messages"][3]
    options = rows("Options of the server")
    assert f"{DEFAULT_MAX_BODY_BYTES >> 20}MiB" in options["--max-body-size"][0]
    assert str(DEFAULT_MAX_PROMPT_CHARACTERS) in options["--max-prompt-characters"][0]
    limits = Limits()
    kept = section("Retries: Idempotency-Key")
    for number in (
        MAX_KEY_CHARACTERS,
        limits.answers,
        limits.total_bytes >> 20,
        int(limits.ttl_s // 60),
        int(limits.grace_s),
    ):
        assert str(number) in kept
    assert f"{BODY_GAP_S:g}" in section("Bodies")
    for name in (*METHODS, *EXPOSED_HEADERS):
        assert f"`{name}`" in section("Pages of other origins")
    for limit in ApiKey.__dataclass_fields__:
        if limit != "digest":
            assert f"`{limit}`" in section("Keys")
