"""What `serve` and `gateway` make of a cluster's file, of `--set`, and of options given beside them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from noted_serve import Run, noted_serve
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.cli.serve import serve
from headrace.cluster.options import GatewayOptions
from headrace.config.reading import read_cluster

SEED = Path(__file__).parents[1] / "config" / "seed.yaml"
WHOLE = {
    "model": "m",
    "served_model_name": "name",
    "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 2}, "both": {"replicas": 3}},
    "split_policy": {"prompt_length_threshold": 60, "prefill_queue_max": 7},
    "cache": {"reuse_prefix": False},
    "engine": {
        "dtype": "float32",
        "quantization": "int8",
        "threads": 4,
        "max_model_len": 100,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 50,
        "max_waiting": 9,
        "kv_cache_memory": "64MiB",
        "block_size": 8,
        "batch_invariant": True,
        "step_timeout": 30,
    },
    "transfer": {"connector": "tcp", "check_reads": True},
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    return noted_serve(monkeypatch, tmp_path)


def written(directory: Path, content: object) -> str:
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_every_field_that_has_an_option_of_serve_becomes_it(tmp_path: Path) -> None:
    options = read_cluster(Path(written(tmp_path, WHOLE))).as_options()
    assert options == {
        "model": "m",
        "served_model_name": "name",
        "prefill": 1,
        "decode": 2,
        "both": 3,
        "no_prefix_caching": True,
        **WHOLE["split_policy"],
        **WHOLE["engine"],
        **WHOLE["transfer"],
    }
    assert set(options) <= set(inspect.signature(serve).parameters)


def test_every_option_reaches_its_part(run: Run, tmp_path: Path) -> None:
    code, output, given = run("serve", "--config", written(tmp_path, WHOLE))
    assert code == 0, output
    engine = given["engine"]
    said = WHOLE["engine"]
    assert {name: getattr(engine, name) for name in said if hasattr(engine, name)} == {
        name: value for name, value in said.items() if name != "step_timeout"
    } | {"kv_cache_memory": 64 << 20}
    assert engine.served_name == "name"
    assert not engine.prefix_caching
    assert given["pools"].step_timeout_s == 30
    assert (given["pools"].connector, given["pools"].check_reads) == ("tcp", True)
    assert (given["pools"].prefill, given["pools"].decode, given["pools"].both) == (1, 2, 3)


def test_what_is_not_said_is_left_to_the_command_line(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, {"pools": {"both": {"replicas": 2}}})
    assert read_cluster(Path(path)).as_options() == {"both": 2}
    code, output, given = run("serve", "some", "--config", path)
    assert code == 0, output
    assert given["model"] == "some"
    assert given["gateway"] == GatewayOptions()


def test_options_go_before_set_and_set_before_the_file(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    code, output, given = run(
        *("serve", "other", "--config", path, "--prefill-queue-max", "5", "--threads", "6"),
        *("--set", "split_policy.prefill_queue_max=6", "--set", "engine.threads=5"),
        *("--set", "engine.block_size=4", "--set", "routing.policy=random"),
    )
    assert code == 0, output
    assert given["model"] == "other"
    assert given["gateway"].split.prefill_queue_max == 5
    assert given["gateway"].split.prompt_length_threshold == 60
    assert given["gateway"].routing.policy == "random"
    assert given["engine"].threads == 6
    assert given["engine"].block_size == 4


@pytest.mark.parametrize("first", [True, False])
def test_set_may_come_before_the_file_or_without_one(run: Run, tmp_path: Path, first: bool) -> None:
    config, override = ("--config", written(tmp_path, WHOLE)), ("--set", "slo.ttft_ms=321")
    code, output, given = run("serve", *(override + config if first else config + override))
    assert code == 0, output
    assert given["gateway"].slo.ttft_s == 0.321
    code, output, given = run("serve", "some", *override)
    assert code == 0, output
    assert given["gateway"].slo.ttft_s == 0.321


def test_a_gateway_takes_what_is_not_of_workers(run: Run) -> None:
    code, output, given = run("gateway", "--config", str(SEED), "--set", "slo.tpot_ms=40")
    assert code == 0, output
    assert given["model"] == "llama-70b"
    assert given["gateway"].routing.prefix_cache_weight == 10.0
    assert given["gateway"].slo.tpot_s == 0.04
    assert given["pools"].roles() == {}
    assert f"{SEED}: autoscale is of workers" in output


def test_what_is_odd_is_told_at_the_start(run: Run) -> None:
    _, output, _ = run("serve", "--config", str(SEED))
    assert "note: qos.low_priority_threshold_ms" in output
    _, output, _ = run("serve", "some")
    assert "note" not in output


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_what_is_wrong_is_refused_before_anything_starts(run: Run, tmp_path: Path, command: str) -> None:
    path = written(tmp_path, {"pools": {"both": {"replica": 1}}})
    for options, said in (
        (("--config", path), "pools.both.replica: is not a known field; did you mean pools.both.replicas?"),
        (("some", "--set", "pool=3"), "--set: pool: is not a known field"),
        (("--config", str(tmp_path / "none.yaml")), "No such file"),
    ):
        code, output, given = run(command, *options)
        assert code == 1
        assert "headrace: error:" in output and said in output
        assert given == {}


def test_a_model_that_is_not_here_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--config", str(SEED)])
    assert done.exit_code == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("headrace: error: no model 'llama-70b'")
    assert said.endswith(f"{SEED} names it; name another with --set model=NAME")
    done = CliRunner().invoke(app, ["serve", "llama-71b", "--port", "0", "--config", str(SEED)])
    assert "--set" not in done.stderr.splitlines()[-1]
