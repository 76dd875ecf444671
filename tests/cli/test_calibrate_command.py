"""`headrace calibrate` on a tiny model with random weights: from an engine's steps to the simulation."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.sim.cost import StepCost
from headrace.sim.cost.calibration import Calibration
from headrace.sim.torch_shape import _directory


def test_a_tiny_model_is_measured_and_the_simulation_reads_what_was_found(tmp_path: Path) -> None:
    output = tmp_path / "here.json"
    options = "--threads", "1", "--repeats", "1", "--kv-cache-memory", "16MiB", "--output", str(output)
    found = CliRunner().invoke(app, ["calibrate", str(_directory(300, 512, 0)), *options])
    assert found.exit_code == 0, found.output
    calibration = Calibration.read(output)
    assert (calibration.shape.layers, calibration.shape.hidden, calibration.shape.vocab) == (2, 32, 300)
    assert calibration.held_out.steps >= 5
    assert StepCost(calibration.shape, calibration.rates).seconds([(1, 10)]) < 1.0
    assert "steps that were not fitted" in " ".join(found.stdout.split())
    fleet = ["simulate", "fleet", "--both", "1", "--hardware", str(output), "--requests", "2"]
    short = ["--rate", "1", "--max-model-len", "4096"]
    too_long = CliRunner().invoke(app, [*fleet, *short])
    assert too_long.exit_code == 1
    assert "the longest sequence is 512" in too_long.stderr
    too_large = CliRunner().invoke(app, [*fleet, *short, "--model", "smollm2-135m"])
    assert too_large.exit_code == 1
    assert "beyond 100 times, what one reaches says nothing of the other" in too_large.stderr


def test_what_cannot_be_written_is_said_before_anything_is_measured() -> None:
    found = CliRunner().invoke(app, ["calibrate", "--output", "absent/here.json"])
    assert found.exit_code == 1
    assert "there is no directory absent" in found.stderr


def test_an_engine_of_short_sequences_is_refused_in_words(tmp_path: Path) -> None:
    options = ["--threads", "1", "--max-model-len", "32", "--kv-cache-memory", "16MiB"]
    where = ["--output", str(tmp_path / "here.json")]
    found = CliRunner().invoke(app, ["calibrate", str(_directory(300, 512, 0)), *options, *where])
    assert (found.exit_code, type(found.exception)) == (1, SystemExit)
    assert "the longest sequence is 32 tokens" in found.stderr
