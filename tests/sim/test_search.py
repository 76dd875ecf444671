"""The search: it tells what broke, with the fewest faults that break it, and how to see it again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.sim import life
from headrace.sim.cluster import Violation
from headrace.sim.faults import Kind
from headrace.sim.life import Plan, Report
from headrace.sim.search import Scope, search, shrink


def test_shrinking_finds_the_fewest() -> None:
    assert shrink(range(8), lambda kept: 5 in kept) == (5,)
    assert shrink(range(8), lambda kept: {1, 6} <= set(kept)) == (1, 6)
    assert shrink(range(8), lambda kept: True) == ()


def breaks_when_something_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int, what: Plan | None = None) -> Report:
        assert what is not None
        if any(fault.kind is Kind.CUT for fault in what.faults):
            raise Violation("a cut was noticed")
        return Report(seed, "", life.Counter(), life.Counter(), life.Counter(), 1, 1, 1.0)

    monkeypatch.setattr("headrace.sim.search.live", broken)


def test_a_failing_seed_is_told_with_the_faults_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    breaks_when_something_is_cut(monkeypatch)
    verdict = search(range(30), Scope())
    assert verdict.seeds == 30
    assert 0 < len(verdict.failures) < 30
    for failure in verdict.failures:
        assert [fault.kind for fault in failure.faults] == [Kind.CUT]
        whole = Scope().plan(failure.seed).faults
        assert [whole[number] for number in failure.keep] == list(failure.faults)


def test_a_life_that_is_another_one_the_second_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = iter(range(100))

    def different(seed: int, what: Plan | None = None) -> Report:
        return Report(seed, str(next(lives)), life.Counter(), life.Counter(), life.Counter(), 1, 1, 1.0)

    monkeypatch.setattr("headrace.sim.search.live", different)
    verdict = search(range(1, 21), Scope())
    assert [failure.seed for failure in verdict.failures] == [10, 20]
    assert all("was another one" in failure.error for failure in verdict.failures)
    assert search([10], Scope(again_every=0)).failures == []


def test_the_command_says_how_to_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    breaks_when_something_is_cut(monkeypatch)
    found = CliRunner().invoke(app, ["simulate", "--seeds", "0:10", "--faults", "cut,crash"])
    assert found.exit_code == 1
    seed = search(range(10), Scope((Kind.CUT, Kind.CRASH))).failures[0]
    options = f"--seeds {seed.seed} --faults cut,crash --only {seed.keep[0]}"
    assert f"headrace simulate {options}\n" in found.output
    assert CliRunner().invoke(app, ["simulate", *options.split()]).exit_code == 1


def test_what_it_prints_to_replay_a_seed_is_a_line_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    breaks_when_something_is_cut(monkeypatch)
    config = tmp_path / "my cluster's.yaml"
    config.write_text("pools:\n  both: {replicas: 2}\n")
    asked = ["--seeds", "0:4", "--faults", "cut,cut one way,break pull", "--config", str(config)]
    found = CliRunner().invoke(app, ["simulate", *asked])
    assert found.exit_code == 1
    printed = [line.split(maxsplit=1)[1] for line in found.output.splitlines() if "headrace simulate" in line]
    assert len(printed) >= 2  # the whole and the smallest, for each failure
    for line in printed:
        echoed = subprocess.check_output(
            ["sh", "-c", line.replace("headrace", "printf '%s\\n'", 1)], text=True
        )
        command, *options = echoed.splitlines()
        assert command == "simulate"
        again = CliRunner().invoke(app, ["simulate", *options])
        assert again.exit_code == 1, (line, again.output)
        assert "Violation: a cut was noticed" in again.output


def test_a_history_of_too_many_workers_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("pools:\n  both: {replicas: 10000}\n")
    found = CliRunner().invoke(app, ["simulate", "--seeds", "1", "--config", str(config)])
    assert found.exit_code == 1
    assert "10000 workers, and a history has at most 64" in found.output


def test_a_real_history_from_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("pools:\n  prefill: {replicas: 1}\n  decode: {replicas: 1}\n")
    found = CliRunner().invoke(app, ["simulate", "--seeds", "1", "--faults", "none", "--config", str(config)])
    assert found.exit_code == 0, found.output
    assert "1 histories, 0 with violations" in found.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "x"], "--seeds is 'x'"),
        (["--seeds", "5:5"], "names no seed"),
        (["--faults", "flood"], "there is no 'flood'"),
        (["--only", "10"], "10 faults are drawn"),
        (["--executor", "abacus"], "there are hash and torch"),
    ],
)
def test_what_cannot_be_searched_is_said(options: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["simulate", *options])
    assert found.exit_code == 1
    assert said in found.output + found.stderr
