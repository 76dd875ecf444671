"""docs/configuration.md and docs/config.schema.json against the models of a cluster's file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.api.options import gateway_options
from headrace.cluster.options import GatewayOptions
from headrace.cluster.routing.policies import POLICIES as CLASSES
from headrace.config import EngineOptions
from headrace.config.cluster import POLICIES, ClusterFile
from headrace.config.reading import fields, read_cluster
from headrace.config.schema import schema_text
from headrace.worker import WorkerOptions

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "configuration.md").read_text()
SCHEMA = json.loads(schema_text())
SECTIONS = {
    "The whole file": "ClusterFile",
    "models.NAME": "Model",
    "pools": "Pools",
    "pools.POOL": "Pool",
    "split_policy": "SplitPolicy",
    "routing": "Routing",
    "cache": "Cache",
    "engine": "Engine",
    "transfer": "Transfer",
    "slo": "Slo",
    "qos": "Qos",
    "qos.degrade": "DegradeStep",
    "autoscale": "Autoscale",
    "autoscale.POOL": "PoolAutoscale",
    "autoscale.POOL.scale_up": "ScaleUp",
    "autoscale.POOL.scale_down": "ScaleDown",
}


def rows_of(model: str) -> Iterator[str]:
    """The rows of a model's table: field, type with its limits, default, unit, meaning."""
    about = SCHEMA if model == "ClusterFile" else SCHEMA["$defs"][model]
    for name, field in about["properties"].items():
        value = next((one for one in field.get("anyOf", ()) if one.get("type") != "null"), field)
        if (section := section_of(value)) is not None:
            told = field.get("description") or SCHEMA["$defs"][section]["description"]
            yield f"| `{name}` | section | | | {in_one_line(told)} |"
            continue
        default = "required" if name in about.get("required", ()) else shown(field["default"])
        unit = value.get("unit", field.get("unit", ""))
        yield f"| `{name}` | {type_of(value)} | {default} | {unit} | {in_one_line(field['description'])} |"


def section_of(value: dict[str, Any]) -> str | None:
    reference = value.get("$ref")
    return reference.rpartition("/")[2] if reference else None


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def shown(default: Any) -> str:
    return "" if default is None else f"`{json.dumps(default)}`"


def type_of(value: dict[str, Any]) -> str:
    if "enum" in value:
        return " or ".join(f"`{one}`" for one in value["enum"])
    kind = value["type"]
    if kind == "array":
        return "list of sections"
    if kind == "object":
        return f"{'sections' if '$ref' in value['additionalProperties'] else 'numbers'} by name"
    words = kind if isinstance(kind, str) else " or ".join(kind)
    if {"minimum", "maximum"} <= value.keys():
        return f"{words}, {value['minimum']} to {value['maximum']}"
    if {"exclusiveMinimum", "maximum"} <= value.keys():
        return f"{words}, above {value['exclusiveMinimum']}, at most {value['maximum']}"
    if "minimum" in value:
        return f"{words}, at least {value['minimum']}"
    if "exclusiveMinimum" in value:
        words += f", above {value['exclusiveMinimum']}"
    return f"{words}, below {value['exclusiveMaximum']}" if "exclusiveMaximum" in value else words


def documented(title: str) -> list[str]:
    found = re.search(rf"^##+ `?{re.escape(title)}`?\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    assert found is not None, f"docs/configuration.md has no section {title!r}"
    return [line for line in found[1].splitlines() if line.startswith("| `")]


@pytest.mark.parametrize(("title", "model"), SECTIONS.items())
def test_the_reference_is_the_models(title: str, model: str) -> None:
    assert documented(title) == list(rows_of(model))


def test_every_section_is_in_the_reference() -> None:
    assert {"ClusterFile", *SCHEMA["$defs"]} == set(SECTIONS.values())


def test_the_published_schema_is_current() -> None:
    said = "docs/config.schema.json is out of date; headrace config schema > docs/config.schema.json"
    assert (DOCS / "config.schema.json").read_text() == schema_text(), said


def test_examples_in_the_reference_are_valid(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    assert len(examples) >= 2
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        path.write_text(example)
        assert yaml.safe_load(example).keys() <= read_cluster(path).model_fields_set


def test_every_field_of_the_schema_is_told_of() -> None:
    names = {path.rpartition(".")[2] for path in fields()}
    assert {row.split("`")[1] for title in SECTIONS for row in documented(title)} >= names


def test_defaults_are_those_of_the_options() -> None:
    assert gateway_options(ClusterFile()) == GatewayOptions()
    worker = WorkerOptions(worker_id="w")
    transfer = ClusterFile().transfer.model_dump()
    assert transfer == {name: getattr(worker, name) for name in transfer}
    engine = ClusterFile().engine.model_dump(exclude={"threads", "step_timeout", "kv_cache_memory"})
    options = EngineOptions(directory="", served_name="")
    assert engine == {name: getattr(options, name) for name in engine}


def test_the_policies_are_those_of_the_router() -> None:
    assert list(POLICIES) == list(CLASSES)
