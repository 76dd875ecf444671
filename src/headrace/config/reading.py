"""From a YAML file and `--set key.path=value` to a `ClusterFile`, or to everything that is wrong with them.

In: a path, overrides. Out: the file's content, checked as a whole before anything starts. What is not known
is refused by name, with the known field that it may have meant.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from headrace.config.cluster import ClusterFile
from headrace.config.consistency import contradictions

_EXAMPLE = "write for example: pools: {prefill: {replicas: 1}, decode: {replicas: 2}}"


class ConfigError(ValueError):
    """A file that says something wrong."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        """Each problem names its field, what is wrong, and what to do."""
        super().__init__(f"{source}: {'; '.join(problems)}")
        self.problems = tuple(problems)


class _EachKeyOnce(yaml.SafeLoader):
    """YAML forbids a key that comes twice; the library takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError):
            # What the library's converters raise for text that is not of its type, without its place.
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(None, None, f"{node.value!r} is no {kind}", node.start_mark) from None


_EachKeyOnce.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
"""1e-9 is a number in JSON and in YAML 1.2; the library reads YAML 1.1, where it has to be 1.0e-9."""


def _parse(text: str) -> Any:
    """Raises YAMLError."""
    try:
        return yaml.load(text, _EachKeyOnce)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2
"""How a value that is not taken is shown: one that names itself, or others many times, has no end."""


def read_cluster(path: Path | None, overrides: Sequence[str] = ()) -> ClusterFile:
    """The file at `path`, if any, after each KEY.PATH=VALUE of `overrides`, in their order.

    Raises OSError, ConfigError.
    """
    content = _load(path) if path is not None else {}
    for text in overrides:
        _override(content, text)
    source = " and ".join([*([str(path)] if path is not None else []), *(["--set"] if overrides else [])])
    try:
        found = ClusterFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError(source, [_problem(one) for one in error.errors()]) from None
    if problems := contradictions(found):
        raise ConfigError(source, problems)
    return found


def fields(model: type[BaseModel] = ClusterFile, under: str = "") -> Iterator[str]:
    """The path of every field that holds a value: model, pools.prefill.replicas, ..."""
    for name, field in model.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            yield from fields(section, f"{under}{name}.")
        else:
            yield under + name


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one and no more."""
    if get_origin(annotation) in (list, dict):
        return None
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def _load(path: Path) -> dict[str, Any]:
    try:
        content = _parse(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"this is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(content, dict):
        raise ConfigError(str(path), [f"there are no fields; {_EXAMPLE}"])
    return content


def _override(content: dict[str, Any], text: str) -> None:
    """Put the value of `text` into `content`."""
    key, equals, value = text.partition("=")
    *above, name = names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {text}", ["give KEY.PATH=VALUE, as in split_policy.prefill_queue_max=16"])
    try:
        parsed = _parse(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text}", [f"the value is not YAML: {' '.join(str(error).split())}"]
        ) from None
    section = content
    for depth, each in enumerate(above, 1):
        inner = section.get(each)
        if inner is None:
            inner = section[each] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}", [f"{'.'.join(names[:depth])} is {inner!r}, and has no fields"])
        section = inner
    section[name] = parsed


def _problem(error: Any) -> str:
    """One of pydantic's errors in our words."""
    where = [str(part) for part in error["loc"]]
    field = ".".join(where)
    if error["type"] == "extra_forbidden":
        return f"{field}: is not a known field; {_meant(where)}"
    if error["type"] == "missing":
        return f"{field}: is missing"
    if error["type"] == "value_error":  # our own words
        return f"{field}: {error['ctx']['error']}"
    if error["type"] == "model_type":
        return f"{field}: is a section of fields, got {_SHORT.repr(error['input'])}"
    said = error["msg"].removeprefix("Input ").lower()
    return f"{field}: {said}, got {_SHORT.repr(error['input'])}"


def _meant(where: Sequence[str]) -> str:
    """The known field that an unknown one may have been meant for."""
    *above, name = where
    model: type[BaseModel] = ClusterFile
    for each in above:
        if each in model.model_fields:  # else a place in a list, or a name
            annotation = model.model_fields[each].annotation
            model = section_of(annotation) or section_of((None, *get_args(annotation))[-1]) or model
    prefix = "".join(f"{each}." for each in above)
    known = list(model.model_fields)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {prefix}{close[0]}?"
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(list(fields()))}
    if close := difflib.get_close_matches(name, [*elsewhere], n=1, cutoff=0.8):
        return f"did you mean {elsewhere[close[0]]}?"
    return f"{prefix.rstrip('.') or 'a cluster'} has {', '.join(known)}"
