"""`headrace config check` and `schema`: words, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.api.lacks import Machine, lacks
from headrace.cli.app import app
from headrace.config.reading import read_cluster
from headrace.config.schema import schema_text
from headrace.sim.torch_shape import _directory

SEED = Path(__file__).parents[1] / "config" / "seed.yaml"
LARGE = Machine(cores=128, memory=1 << 40, gpus=8, nixl=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["config", *arguments], env={"COLUMNS": "110"})
    return done.exit_code, done.stdout, done.stderr


def test_the_seed_is_told_section_by_section() -> None:
    code, said, _ = run("check", str(SEED))
    assert code == 0
    sections = [line.partition(":")[0] for line in said.splitlines() if line and not line.startswith(" ")]
    assert sections[1:] == [
        *(
            "model",
            "pools",
            "split_policy",
            "routing",
            "cache",
            "engine",
            "transfer",
            "slo",
            "qos",
            "autoscale",
        ),
        *("To look at", "What this machine lacks"),
    ]
    assert "what is marked (later) acts in a later one" in said
    assert "model: no model 'llama-70b'" in said
    assert "--set model=NAME" in said
    assert "(default)" in said
    assert max(map(len, said.splitlines())) <= 110


@pytest.mark.parametrize("columns", [40, 80, 110])
def test_long_values_take_no_room_from_words(columns: int) -> None:
    model, ladder = f"model=/{'long/' * 20}", "qos.degrade=[{lower: n, to: 1}]"
    done = CliRunner().invoke(
        app,
        ["config", "check", str(SEED), "--set", model, "--set", ladder],
        env={"COLUMNS": str(columns)},
    )
    said = done.stdout.split("What this machine lacks")[0].split("To look at")[0]
    assert f"/{'long/' * 20}\n" in said
    assert "1 step " in said
    assert len(said.splitlines()) < 300
    widest = max(len(line) for line in said.splitlines() if "long/" not in line and "autoscale:" not in line)
    assert widest <= max(columns, 84)


def test_overrides_are_checked_too() -> None:
    code, said, _ = run("check", str(SEED), "--set", "model=smollm2-135m", "--set", "slo.ttft_ms=500")
    assert code == 0
    assert "smollm2-135m" in said
    assert "To look at" not in said


def test_what_is_not_valid_is_listed_and_ends_with_1(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("slo: {ttft: 3, tpot_ms: 0}\n")
    code, _, said = run("check", str(path))
    assert code == 1
    first, *problems = said.splitlines()
    assert first == f"{path} is not valid:"
    assert [problem.split(":")[0] for problem in problems] == ["  slo.tpot_ms", "  slo.ttft"]
    code, said, _ = run("check", str(path), "--json")
    assert code == 1
    assert json.loads(said)["valid"] is False
    assert len(json.loads(said)["problems"]) == 2


def test_a_file_that_is_not_there_ends_with_1(tmp_path: Path) -> None:
    code, _, said = run("check", str(tmp_path / "none.yaml"))
    assert code == 1
    assert "No such file" in said


def test_json_has_the_same() -> None:
    code, said, _ = run("check", str(SEED), "--json")
    assert code == 0
    found = json.loads(said)
    assert found["valid"] is True
    assert found["sections"]["split_policy"][0] == {
        "field": "split_policy.prompt_length_threshold",
        "value": 256,
        "says": "a prompt with more than 256 uncached tokens goes to a prefill worker",
        "default": False,
        "acts": True,
    }
    assert len(found["notes"]) == 1
    assert found["machine_lacks"][0].startswith("model: no model 'llama-70b'")


def test_the_schema_is_printed() -> None:
    assert run("schema") == (0, schema_text(), "")


@pytest.mark.parametrize(
    ("machine", "overrides", "missing"),
    [
        (LARGE, (), ["model"]),
        (LARGE, ("model=smollm2-135m",), ["model"]),  # it has to be pulled first
        (Machine(cores=4, memory=1 << 40, gpus=8, nixl=True), (), ["model", "cores"]),
        (LARGE, ("engine.threads=256",), ["model", "cores"]),
        (LARGE, ("routing.policy=no.such:Class",), ["model", "routing.policy"]),
        (Machine(cores=128, memory=11 << 30, gpus=8, nixl=True), (), ["model", "memory"]),
        (Machine(cores=128, memory=None, gpus=8, nixl=True), (), ["model"]),
        (Machine(cores=128, memory=1 << 40, gpus=0, nixl=True), (), ["model", "GPUs", "GPUs"]),
        (Machine(cores=128, memory=1 << 40, gpus=8, nixl=False), (), ["model", "NIXL"]),
        (
            Machine(cores=128, memory=1 << 40, gpus=8, nixl=False),
            ("transfer.connector=nixl",),
            ["model", "NIXL"],
        ),
        (Machine(cores=128, memory=1 << 40, gpus=8, nixl=False), ("transfer.connector=tcp",), ["model"]),
    ],
)
def test_what_a_machine_lacks(machine: Machine, overrides: tuple[str, ...], missing: list[str]) -> None:
    assert [each.partition(":")[0] for each in lacks(read_cluster(SEED, overrides), machine)] == missing


def test_a_machine_may_lack_nothing(tmp_path: Path) -> None:
    alone = Machine(cores=1, memory=1 << 31, gpus=0, nixl=False)
    assert lacks(read_cluster(None, ("engine.kv_cache_memory=64MiB",)), alone) == []
    lacking = lacks(read_cluster(None, (f"model={tmp_path}",)), alone)
    assert len(lacking) == 1 and str(tmp_path) in lacking[0]  # a directory without a model in it


def test_this_machine_is_looked_at() -> None:
    assert Machine.this().cores >= 1


MINE = "from headrace.cluster.routing import Policy\nclass Mine(Policy):\n    "


def test_a_policy_of_ones_own_is_found_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("routing: {policy: 'checked_policy:Mine'}\n")
    code, said, _ = run("check", str(path))
    assert code == 0
    told = f"no module 'checked_policy' on Python's path, nor in {tmp_path}"
    assert "".join(told.split()) in "".join(said.split())  # long paths are broken at hyphens, too
    (tmp_path / "checked_policy.py").write_text(f"{MINE}def terms(self, among): return {{}}\n")
    code, said, _ = run("check", str(path))
    assert code == 0
    assert "routing.policy:" not in said


def test_one_that_is_there_and_is_none_is_not_valid(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("routing: {policy: 'abstract_policy:Mine'}\n")
    (tmp_path / "abstract_policy.py").write_text(f"{MINE}pass\n")
    code, _, said = run("check", str(path))
    assert code == 1
    assert "routing.policy: the routing policy 'abstract_policy:Mine' lacks terms" in said
    assert "abstract_policy.py, line 2" in said
    fleet = ["simulate", "fleet", "--both", "1", "--requests", "2", "--config", str(path)]
    done = CliRunner().invoke(app, fleet)
    assert (done.exit_code, done.exception.__class__) == (1, SystemExit)
    assert "lacks terms" in done.stderr


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("kv_cache_memory=1KiB", "engine: kv_cache_memory of 1024 bytes holds 0 blocks"),
        ("max_model_len=100000", "engine: max_model_len is 100000; the model's positions reach to 512"),
        ("max_model_len=512", ""),
    ],
)
def test_what_the_models_engine_would_refuse_is_not_valid(field: str, says: str) -> None:
    overrides = "--set", f"model={_directory(300, 512, 0)}", "--set", f"engine.{field}"
    code, _, said = run("check", str(SEED), *overrides, "--set", "engine.threads=1")
    assert code == (1 if says else 0)
    assert says in said


def test_models_that_are_not_here_are_told_by_their_names(tmp_path: Path) -> None:
    machine = Machine(cores=4, memory=None, gpus=0, nixl=True)
    file = read_cluster(None, (f"models={{chat: {{versions: {{a: 1, {tmp_path}: 1}}}}}}",))
    assert [each.partition(": ")[0] for each in lacks(file, machine)] == ["models.a", f"models.{tmp_path}"]
