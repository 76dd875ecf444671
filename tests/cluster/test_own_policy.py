"""A routing policy of the user's own: where its module is found, and what becomes of one that is wrong."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from house import House, in_house, request
from members import member
from test_routing import House as RouterHouse
from test_routing import many

from headrace.cluster.options import GatewayOptions, RoutingOptions
from headrace.cluster.routing.own import PolicyNotFoundError
from headrace.cluster.routing.policies import policy_of

SOUND = "from headrace.cluster.routing import Policy\nclass Mine(Policy):\n    "
TERMS = "def terms(self, among): return {'load': among.load}\n"


def written(directory: Path, text: str, name: str) -> str:
    """Write a module, and name the class in it."""
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.py").write_text(text)
    return f"{name}:Mine"


def load(policy: str, *directories: Path) -> object:
    options = RoutingOptions(policy=policy, policy_directories=tuple(map(str, directories)))
    return policy_of(options, random.Random(0))


def test_its_module_is_found_beside_the_file_and_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = written(tmp_path, SOUND + TERMS, "own_here")
    assert type(policy_of(RoutingOptions(policy=here), random.Random(0))).__name__ == "Mine"
    written(tmp_path / "beside", SOUND + TERMS, "own_helper")
    beside = written(tmp_path / "beside", "from own_helper import Mine\n", "own_beside")
    path = list(sys.path)
    assert type(load(beside, tmp_path / "beside")).__name__ == "Mine"
    assert sys.path == path


def test_what_is_installed_goes_before_a_file_of_the_same_name(tmp_path: Path) -> None:
    written(tmp_path, SOUND + TERMS, "fractions")
    with pytest.raises(ValueError, match=r"fractions.py has no Mine") as refused:
        load("fractions:Mine", tmp_path)
    assert str(tmp_path) not in str(refused.value)


def test_where_it_was_looked_for_is_told(tmp_path: Path) -> None:
    with pytest.raises(PolicyNotFoundError, match=r"no module 'own_absent'") as refused:
        load("own_absent.part:Mine", tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "says", "line"),
    [
        ("own_abstract", SOUND + "pass\n", "lacks terms", 2),
        (
            "own_init",
            SOUND + TERMS + "    def __init__(self, *given):\n        1 / 0\n",
            "division by zero",
            5,
        ),
        ("own_few", SOUND + TERMS + "    def __init__(self): pass\n", "TypeError", 2),
        ("own_quits", SOUND + TERMS + "raise SystemExit('no')\n", "SystemExit: no", 4),
        ("own_within", "import own_absent_too\n", "No module named 'own_absent_too'", 1),
        ("own_wrong", "class Mine(:\n", "SyntaxError", 1),
        ("own_other", "class Mine: pass\n", "is no routing policy", 1),
    ],
)
def test_what_is_wrong_with_it_is_told_with_file_and_line(
    name: str, text: str, says: str, line: int, tmp_path: Path
) -> None:
    policy = written(tmp_path, text, name)
    with pytest.raises(ValueError, match=policy) as refused:
        load(policy, tmp_path)
    assert not isinstance(refused.value, PolicyNotFoundError)
    assert says in str(refused.value)
    assert f"{tmp_path / name}.py, line {line}" in str(refused.value)


def test_an_error_of_a_module_beside_it_is_told_where_it_is(tmp_path: Path) -> None:
    written(tmp_path, "\n\nimport json\njson.loads('{')\n", "own_sibling")
    policy = written(tmp_path, "import own_sibling\n", "own_importer")
    with pytest.raises(ValueError, match=r"own_sibling\.py, line 4"):
        load(policy, tmp_path)


BAD = f"""
import asyncio
import numpy as np
{SOUND}{TERMS}
class Numbered(Mine):
    def terms(self, among): return {{1: among.load}}
class Unprintable(Mine):
    def terms(self, among): return {{"\\udcff": among.load}}
class Texts(Mine):
    def terms(self, among): return {{"name": ["a"] * len(among)}}
class Quits(Mine):
    def terms(self, among): raise SystemExit("says no")
class Ends(Mine):
    def terms(self, among): raise GeneratorExit
class Secret(Mine):
    def terms(self, among):
        class Odd(Exception):
            def __str__(self): raise ValueError("never")
        raise Odd
class Cancels(Mine):
    def terms(self, among): raise asyncio.CancelledError("so there")
class Interrupted(Mine):
    def terms(self, among): raise KeyboardInterrupt
class Reuses(Mine):
    def terms(self, among):
        self.kept = getattr(self, "kept", {{"load": np.zeros(len(among))}})
        self.kept["load"] += 1.0
        return self.kept
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_bad", raising=False)
    written(tmp_path, BAD, "own_bad")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Numbered", "the name of a term is 1"),
        ("Unprintable", r"the name of a term is '\udcff'"),
        ("Texts", "could not convert"),
        ("Quits", "SystemExit: says no"),
        ("Ends", "GeneratorExit"),
        ("Cancels", "CancelledError: so there"),
        ("Secret", "str() failed"),
    ],
)
@pytest.mark.usefixtures("bad")
def test_whatever_it_does_is_a_failure_of_the_policy(name: str, says: str) -> None:
    decision = many(policy=f"own_bad:{name}").choose()
    assert decision.worker == "w0"
    assert f"policy own_bad:{name} failed with" in decision.rule
    assert says in decision.rule
    assert [list(one.terms) for one in decision.considered()] == [["load"]] * 6
    assert decision.rule.encode()


@pytest.mark.usefixtures("bad")
def test_its_failure_is_told_also_where_there_was_no_choice() -> None:
    decision = RouterHouse(member("a"), policy="own_bad:Quits").choose()
    assert "failed with SystemExit: says no" in decision.rule
    assert RouterHouse(member("a")).choose().rule == "the only one with room"


@pytest.mark.usefixtures("bad")
def test_a_decision_stays_as_it_was_made() -> None:
    house = RouterHouse(member("a"), member("b"), policy="own_bad:Reuses")
    first = house.choose()
    house.choose()
    assert [one.terms for one in first.considered()] == [{"load": 1.0}] * 2


@pytest.mark.usefixtures("bad")
def test_nothing_is_left_of_a_request_that_was_interrupted_while_it_was_placed() -> None:
    async def body(house: House) -> None:
        for number in range(3):
            with pytest.raises(KeyboardInterrupt):
                house.gateway.submit(request(f"r{number}"))
        assert house.gateway.open_samples == 0

    in_house("virtual", body, options=GatewayOptions(routing=RoutingOptions(policy="own_bad:Interrupted")))
