"""The section `models`: what it means, what contradicts, and what it is in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.api.options import gateway_options
from headrace.cluster.options import AliasOptions, DegradeStep, ModelOptions
from headrace.config.cluster import ClusterFile
from headrace.config.consistency import remarks
from headrace.config.reading import ConfigError, read_cluster
from headrace.config.words import in_words

MODELS = {
    "chat": {"versions": {"small": 90, "tuned": 10}, "smaller": "tiny"},
    "tuned": {"model": "./tuned", "smaller": "small"},
}
STEP = {"degrade": [{"lower": "model", "above": 0.9}]}


def read(tmp_path: Path, content: object) -> ClusterFile:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_cluster(path)


def test_models_that_are_only_named_are_served_by_their_own_names(tmp_path: Path) -> None:
    file = read(tmp_path, {"models": MODELS, "qos": STEP})
    assert file.sources() == {"tuned": "./tuned", "small": "small", "tiny": "tiny"}
    options = gateway_options(file)
    assert options.models == (
        ModelOptions(name="tuned", smaller="small"),
        ModelOptions(name="small"),
        ModelOptions(name="tiny"),
    )
    assert options.aliases == (
        AliasOptions(name="chat", versions=(("small", 90.0), ("tuned", 10.0)), smaller="tiny"),
    )
    assert options.admission.degrade == (DegradeStep(lower="model", above=0.9),)
    assert remarks(file) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"models": {"a": {"model": "x", "versions": {"b": 1}}}}, "models.a: it has versions, and is no"),
        ({"models": {"a": {"versions": {"b": 0}}}}, "models.a: versions: none has a weight above 0"),
        ({"models": {"a": {"versions": {}}}}, "models.a: versions: none has a weight above 0"),
        ({"models": {"a": {"versions": {"b": -1}}}}, "models.a.versions.b: should be greater than or equal"),
        (
            {"models": {"a": {"versions": {"b": 1}}, "b": {"versions": {"c": 1}}}},
            "models.a.versions.b: it has versions itself",
        ),
        (
            {"models": {"a": {"smaller": "b"}, "b": {"versions": {"c": 1}}}},
            "models.a.smaller: b has versions; name one of them",
        ),
        ({"models": {" ": {}}}, "models: a name is empty"),
        ({"models": {"a": {"smaller": "a"}}}, "models.a.smaller: a is what serves anyway"),
        (
            {"models": {"a": {"versions": {"b": 1}, "smaller": "b"}}},
            "models.a.smaller: b is what serves anyway",
        ),
        (
            {"served_model_name": "a", "models": {"a": {"model": "b"}}},
            "models.a: served_model_name calls model so",
        ),
        ({"models": {"a": {"version": {"b": 1}}}}, "models.a.version: is not a known field; did you mean"),
        ({"qos": {"degrade": [{"lower": "model", "to": 3}]}}, "qos.degrade.0: to: a model is lowered to"),
        ({"qos": {"degrade": [{"lower": "n"}]}}, "qos.degrade.0: to: is missing; say how much is left of n"),
        (
            {"qos": {"degrade": [{"lower": "model"}, {"lower": "n", "to": 1}, {"lower": "model"}]}},
            "qos.degrade.2: the model is a smaller one by then",
        ),
    ],
)
def test_what_contradicts_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, content)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(said)


def test_what_does_not_act_is_told(tmp_path: Path) -> None:
    (told,) = remarks(read(tmp_path, {"models": {"a": {"smaller": "b"}}}))
    assert told == "models.a.smaller: acts only with a step of qos.degrade with lower: model"
    (told,) = remarks(read(tmp_path, {"qos": STEP}))
    assert told.startswith("qos.degrade.0: no model has a smaller one; name it as in models:")


def test_names_are_told_in_words(tmp_path: Path) -> None:
    file = read(tmp_path, {"models": MODELS, "qos": STEP})
    told = {line.field: line for section in in_words(file).values() for line in section}
    assert told["models.tuned.model"].says == "./tuned is served as tuned"
    assert told["models.tiny.model"].default
    assert told["models.chat.versions"].says == (
        "of the requests for chat, a share of 0.9 to small, 0.1 to tuned; a session keeps to one"
    )
    assert told["models.chat.smaller"].says == "serves in place of chat above 90% of what is allowed"
    assert told["qos.degrade"].says == "model down to the smaller one above 90% of what is allowed"
    assert "for all but gateway" in told["model"].says
    without = read(tmp_path, {"models": MODELS})
    told = {line.field: line for section in in_words(without).values() for line in section}
    assert "does not act" in told["models.chat.smaller"].says
