"""What a cluster's file and `--explain` do in `headrace simulate fleet`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.cli.fleet_file import ACT, without_meaning
from headrace.cli.journeys import journey_lines
from headrace.config.reading import fields, read_cluster

LOAD = "--model", "llama-8b", "--requests", "12", "--rate", "4", "--both", "1"


def fleet(*options: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["simulate", "fleet", *LOAD, *options])
    return found.exit_code, found.stdout, found.stderr


def figures(tmp_path: Path, *options: str) -> dict[str, Any]:
    kept = tmp_path / "kept.json"
    code, _, err = fleet(*options, "--json", str(kept))
    assert code == 0, err
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def ttft_s(found: dict[str, Any]) -> float:
    return float(sum(one["ttft_s"] for one in found["requests"]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return figures(tmp_path_factory.mktemp("plain"))


def test_without_prefixes_that_are_reused_nothing_is_found(plain: dict[str, Any], tmp_path: Path) -> None:
    assert plain["hit_rate"] > 0.2
    assert figures(tmp_path, "--set", "cache.reuse_prefix=false")["hit_rate"] == 0.0


def test_one_row_makes_requests_wait_and_the_command_line_goes_first(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    alone = ("--set", "engine.max_num_seqs=1")
    assert ttft_s(figures(tmp_path, *alone)) > 5 * ttft_s(plain)
    assert ttft_s(figures(tmp_path, *alone, "--max-num-seqs", "256")) == ttft_s(plain)


@pytest.mark.parametrize(
    "field",
    [
        "engine.max_num_batched_tokens=256",
        "engine.max_model_len=2750",
        "engine.kv_cache_memory=700MiB",
        "engine.block_size=1024",
    ],
)
def test_fields_of_the_engine_act(plain: dict[str, Any], tmp_path: Path, field: str) -> None:
    assert figures(tmp_path, "--set", field)["requests"] != plain["requests"]


def test_queues_that_are_short_refuse(tmp_path: Path) -> None:
    few = ("--set", "engine.max_num_seqs=1", "--set", "engine.max_waiting=1")
    found = figures(tmp_path, *few)
    assert sum(one["ended"] == "overloaded" for one in found["requests"]) > 3


def test_fields_without_meaning_are_told_in_one_line() -> None:
    code, _, err = fleet(
        *("--set", "engine.dtype=bfloat16", "--set", "transfer.connector=tcp", "--set", "slo.objective=0.9"),
        *("--set", "slo.ttft_ms=900"),
    )
    assert code == 0
    assert err == "note: --set: no meaning in a simulation: engine.dtype, transfer.connector, slo.objective\n"
    assert fleet("--set", "slo.ttft_ms=900")[2] == ""


def test_every_field_acts_or_is_told_of() -> None:
    seed = read_cluster(Path(__file__).parents[1] / "config" / "seed.yaml")
    told = set(without_meaning(seed))
    assert "autoscale.prefill.max_replicas" in told
    assert not told & {
        "pools.prefill.replicas",
        "routing.policy",
        "slo.ttft_ms",
        "qos.enable_early_rejection",
    }
    known = set(fields())
    assert all(name in known or any(path.startswith(f"{name}.") for path in known) for name in ACT)


EARLY = ("--set", "qos.enable_early_rejection=true")
ONE_BY_ONE = "decode steps run one by one, for admission foresees by how long they take"


@pytest.mark.parametrize(
    "options", [EARLY, ("--set", "qos.degrade=[{lower: max_tokens, to: 64}]")], ids=["refuses", "degrades"]
)
def test_admission_foresees_by_steps_so_they_run_one_by_one(options: tuple[str, ...]) -> None:
    code, out, _ = fleet(*options)
    assert code == 0
    assert ONE_BY_ONE in out
    assert "decode steps run 4 at a time" not in out
    insisted = fleet(*options, "--stride", "4")[1]
    assert ONE_BY_ONE not in insisted
    assert "with --stride 4 steps look 4 times as long to admission" in insisted
    assert ONE_BY_ONE not in fleet(*options, "--stride", "1")[1]


def test_without_admission_strides_are_as_they_were() -> None:
    out = fleet()[1]
    assert "decode steps run 4 at a time" in out
    assert "admission" not in out


def test_a_simulated_request_is_explained_in_the_words_of_a_servers(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    code, out, err = fleet("--explain", "s0-0", "--explain", "s1-0", "--json", str(kept))
    assert code == 0, err
    journeys = json.loads(kept.read_text())["journeys"]
    assert {one["id"] for one in journeys} == {"s0-0", "s1-0"}
    for journey in journeys:
        assert "\n".join(journey_lines(journey)) in out
    first = next(one for one in journeys if one["id"] == "s0-0")
    whats = [event["what"] for event in first["events"]]
    assert whats[:2] == ["placed", "not offloaded"] and whats[-1].startswith("ended: length")
    assert first["decisions"][0]["candidates"][0]["worker"] == "both0"


def test_all_requests_of_a_session_and_those_that_were_refused(tmp_path: Path) -> None:
    strict = (*EARLY, "--set", "qos.reject_on_slo_violation=true", "--set", "slo.ttft_ms=0.001")
    code, out, _ = fleet(*strict, "--explain", "s0", "--explain", "s1")
    assert code == 0
    assert "request s0-0, " in out  # the first of all: served, as nothing was known of its worker
    assert "refused  (the first token would take about" in out


def test_what_blocks_stand_for_is_told(tmp_path: Path) -> None:
    found = figures(tmp_path, "--both", "0", "--prefill", "1", "--decode", "1", "--explain", "s0-0")
    (moved,) = [e["detail"] for e in found["journeys"][0]["events"] if e["what"] == "blocks transferred"]
    assert moved["bytes"] == moved["blocks"] * 512 * 131_072


def test_a_name_that_no_request_has_is_said() -> None:
    code, _, err = fleet("--explain", "s999-0")
    assert code == 1
    assert "--explain s999-0: there is no such request among the 12 from s0-0 to" in err


def test_the_example_of_the_docs_is_what_it_prints() -> None:
    section = (
        (Path(__file__).parents[2] / "docs" / "simulation.md").read_text().split("## Why did it go there")[1]
    )
    _, command, _, shown, *_ = section.split("```")
    name, *options = command.split()
    assert name == "headrace"
    found = CliRunner().invoke(app, options)
    assert found.exit_code == 0
    said = found.stdout.splitlines()
    for line in shown.strip("\n").splitlines():
        beginning = line.partition("…")[0].rstrip()
        assert any(one.startswith(beginning) for one in said), line
