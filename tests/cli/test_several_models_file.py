"""What `gateway` and `serve` make of several models: on the command line, and in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from noted_serve import Run, noted_serve

from headrace.cluster.options import AliasOptions

ALL = {
    "models": {
        "chat": {"versions": {"a": 3, "b": 1}},
        "a": {"model": "source-of-a", "smaller": "b"},
    }
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    return noted_serve(monkeypatch, tmp_path)


def written(directory: Path, content: object) -> str:
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def served(given: dict[str, Any]) -> dict[str, str]:
    """What each model was read from, by name."""
    first = {given["engine"].served_name: given["files"]}
    return {name: files.revision for name, files in (first | dict(given["others"])).items()}


def test_a_gateway_serves_each_model_that_it_is_given(run: Run) -> None:
    code, output, given = run("gateway", "x", "y")
    assert code == 0, output
    assert served(given) == {"x": "x", "y": "y"}
    assert given["names"] == ("x", "y")


def test_a_gateway_serves_what_its_file_names(run: Run, tmp_path: Path) -> None:
    code, output, given = run("gateway", "--config", written(tmp_path, ALL))
    assert code == 0, output
    assert served(given) == {"a": "source-of-a", "b": "b"}
    assert given["names"] == ("chat", "a", "b")
    assert given["gateway"].aliases == (AliasOptions(name="chat", versions=(("a", 3.0), ("b", 1.0))),)
    assert {model.name: model.smaller for model in given["gateway"].models} == {"a": "b", "b": ""}


def test_the_command_line_goes_before_model_and_beside_models(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, {"model": "m", **ALL})
    code, output, given = run("gateway", "--config", path)
    assert code == 0, output
    assert given["names"] == ("m", "chat", "a", "b")
    code, output, given = run("gateway", "other", "--config", path)
    assert given["names"] == ("other", "chat", "a", "b")


def test_an_entry_of_the_models_own_name_is_that_model(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, {"models": {"m": {"smaller": "tiny"}}})
    code, output, given = run("gateway", "m", "--config", path)
    assert code == 0, output
    assert served(given) == {"m": "m", "tiny": "tiny"}


def test_serve_has_workers_of_its_own_model_and_lets_others_join(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, {"model": "m", **ALL})
    code, output, _ = run("serve", "--config", path)
    assert code == 1
    assert "workers of a, b could not join; add --listen HOST:PORT" in output
    code, output, given = run("serve", "--config", path, "--listen", "127.0.0.1:0")
    assert code == 0, output
    assert given["pools"].roles()
    assert served(given) == {"m": "m", "a": "source-of-a", "b": "b"}


def test_serve_of_one_model_is_as_it_was(run: Run) -> None:
    code, output, given = run("serve", "m", "--served-model-name", "name")
    assert code == 0, output
    assert (given["engine"].served_name, given["others"], given["names"]) == ("name", {}, ("name",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("gateway",), "no model is given; name one or more"),
        (("gateway", "x", "y", "--served-model-name", "z"), "names one model, and 2 are given"),
        (("gateway", "x", "x"), "two models are called 'x'"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Run, options: tuple[str, ...], said: str) -> None:
    code, output, _ = run(*options)
    assert code == 1
    assert said in " ".join(output.split())


def test_a_name_is_a_model_or_has_versions(run: Run, tmp_path: Path) -> None:
    code, output, _ = run("gateway", "chat", "--config", written(tmp_path, ALL))
    assert code == 1
    assert "'chat' is the name of a model, and has versions" in output
