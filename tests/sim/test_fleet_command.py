"""`headrace simulate fleet` and what it makes workers of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.sim.cost import DEVICES, MODELS, Rates
from headrace.sim.cost.calibration import Calibration
from headrace.sim.cost.fit import FitError
from headrace.sim.fleet_setup import choose_worker

RATES = Rates(
    linear_flops_per_s=4e11,
    attention_flops_per_s=1e11,
    bytes_per_s=3e10,
    kv_bytes_per_s=3e10,
    step_s=1e-3,
    row_s=1e-5,
)


def fleet(*options: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["simulate", "fleet", *options])
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path, error = tmp_path / "here.json", FitError(9, 0.07, 0.05, 0.2)
    Calibration(
        machine="two cores",
        shape=MODELS["smollm2-135m"],
        rates=RATES,
        fitted=error,
        held_out=error,
        longest=2560,
    ).write(path)
    return path


def test_a_cluster_of_data_sheets_and_what_its_figures_rest_on(tmp_path: Path) -> None:
    kept = tmp_path / "requests.json"
    code, out, _ = fleet(
        *("--prefill", "1", "--decode", "1", "--model", "llama-8b", "--requests", "12", "--rate", "4"),
        *("--set", "slo.ttft_ms=900", "--json", str(kept)),
    )
    assert code == 0
    assert "12 requests" in out
    assert "12 answered, 0 refused" in out
    assert "within TTFT 900 ms and TPOT 50 ms" in out
    assert "llama-8b on 2 x h100 a worker, by data sheet and assumed efficiencies" in out
    found = json.loads(kept.read_text())
    assert found["attainment"] == 1.0
    assert [one["name"] for one in found["requests"]][:2] == ["s0-0", "s1-0"]
    assert set(found["workers"]) == {"prefill0", "decode0"}


def test_the_file_of_a_cluster_counts_and_the_command_line_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("pools: {both: {replicas: 3}}\nslo: {ttft_ms: 777}\nmodels: {a: {}, b: {}}\n")
    load = "--requests", "4", "--model", "llama-8b", "--config", str(file)
    assert "within TTFT 777 ms" in fleet(*load)[1]
    kept = tmp_path / "kept.json"
    assert fleet(*load, "--both", "1", "--json", str(kept))[0] == 0
    assert list(json.loads(kept.read_text())["workers"]) == ["both0"]


def test_a_calibrated_machine(calibration: Path) -> None:
    code, out, _ = fleet("--both", "1", "--hardware", str(calibration), "--requests", "3", "--rate", "0.1")
    assert code == 0
    assert "two cores; steps are off by 7% in the mean and 20% at most" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "there are no workers"),
        (("--prefill", "2"), "no worker decodes"),
        (("--both", "1", "--hardware", "h900"), "neither a file nor one of a100, h100, h200"),
        (("--both", "1", "--model", "gpt"), "there is no model shape 'gpt'; there are llama-70b"),
        (("--both", "1", "--devices", "5"), "64 heads of llama-70b cannot be shared out to 5"),
        (("--both", "1", "--trace", "absent.jsonl"), "cannot read absent.jsonl"),
        (("--both", "1", "--json", "absent/x.json"), "there is no directory absent"),
    ],
)
def test_what_cannot_be_done_is_said(options: tuple[str, ...], words: str) -> None:
    code, _, err = fleet(*options)
    assert code == 1
    assert words in err
    assert err.count("\n") == 1


def test_as_many_devices_as_weights_and_cache_need(calibration: Path) -> None:
    assert choose_worker("h100", "llama-8b", None, 100_000).cost.devices == 1
    assert choose_worker("h100", "llama-70b", None, 100_000).cost.devices == 4
    eight = choose_worker("h100", None, None, 1_000_000)
    assert (eight.cost.devices, eight.cost.shape.name) == (8, "llama-70b")
    assert eight.nic_bytes_per_s == pytest.approx(8 * 0.9 * DEVICES["h100"].nic_bytes_per_s)
    too_much = choose_worker("h100", None, None, 3_000_000)
    assert any("no such worker can be built" in line for line in too_much.limits(3_000_000, 1))
    assert not any("no such worker" in line for line in eight.limits(1_000_000, 1))
    with pytest.raises(ValueError, match="a calibration is of one device"):
        choose_worker(str(calibration), None, 2, 1000)


def test_a_calibration_is_carried_over_in_its_precision_and_not_too_far(calibration: Path) -> None:
    other = choose_worker(str(calibration), "llama-8b", None, 1000)
    (said,) = [line for line in other.limits(1000, 4) if line.startswith("CARRIED OVER")]
    assert "calibrated with smollm2-135m, not with llama-8b, of 56 times more weights" in said
    assert "sequences of up to 2560 tokens" in other.limits(1000, 4)[0]
    with pytest.raises(ValueError, match="llama-70b has 517 times more weights than smollm2-135m"):
        choose_worker(str(calibration), "llama-70b", None, 1000)
    found = Calibration.read(calibration)
    int8 = dataclasses.replace(found.shape, weight_bytes_each=1.0)
    msgspec.structs.replace(found, shape=int8).write(calibration)
    assert choose_worker(str(calibration), "llama-8b", None, 1000).cost.shape.weight_bytes_each == 1.0
    assert choose_worker(str(calibration), "smollm2-135m", None, 1000).cost.shape == int8
    one_of_before = calibration.read_text().replace('"format": 2', '"format": 1')
    calibration.write_text(one_of_before)
    with pytest.raises(
        ValueError, match="has format 1, and this Headrace reads 2; run headrace calibrate again"
    ):
        choose_worker(str(calibration), None, None, 1000)
