"""The rules for Prometheus: what they name exists, and each alert fires when it should and not else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.config.consistency import paging_shares
from headrace.deploy import prometheus_rules
from headrace.observe import Metrics
from headrace.observe.metrics import PREFIX

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "docs" / "metrics.md"
SERIES = Path(__file__).with_name("headrace.rules.test.yaml")
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(prometheus_rules())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


def promtool(*arguments: str | Path) -> None:
    program = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is neither on PATH nor named by $PROMTOOL; it comes with Prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "headrace.rules.yaml"
    path.write_text(prometheus_rules())
    promtool("check", "rules", path)


def test_alerts_fire_for_the_series_that_they_are_for() -> None:
    promtool("test", "rules", SERIES)


def test_there_are_series_for_each_alert() -> None:
    written = set(re.findall(r"Headrace\w+", SERIES.read_text()))
    assert written == set(ALERTS)


def test_rules_name_what_is_exposed() -> None:
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    metrics = Metrics("m", lambda: 0.0)
    families = list(metrics.collect())
    exposed = {family.name + suffix for family in families for suffix in suffixes[family.type]}
    pairs = {pair for family in families for sample in family.samples for pair in sample.labels.items()}
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for rule in RULES:
        expression = rule["expr"]
        assert set(re.findall(rf"(?<!:)\b{PREFIX}\w+", expression)) <= exposed, expression
        assert set(re.findall(r"\b\w+:headrace_\w+:\w+", expression)) <= recorded, expression
        assert set(re.findall(r'(\w+)!?="(\w+)"', expression)) <= pairs, expression


def test_what_config_check_says_of_pages_is_what_the_rules_and_the_docs_have() -> None:
    """The numbers are tested with the rules; here that both are computed alike."""
    recorded = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
    budget = "model:headrace_slo_budget:ratio"
    assert (
        recorded["model:headrace_slo_burns_fast:ratio"] == f"{budget} * clamp_max({budget} ^ (-1 / 2), 14.4)"
    )
    assert (
        recorded["model:headrace_slo_burns_slowly:ratio"] == f"{budget} * clamp_max({budget} ^ (-1 / 3), 6)"
    )
    rows = re.findall(r"^\| (0\.9\d*) \| ([\d.]+)% \| [^|]+ \| ([\d.]+)% \|", METRICS.read_text(), re.M)
    assert len(rows) == 4
    for objective, *shares in rows:
        assert [f"{100 * share:.2g}" for share in paging_shares(float(objective))] == shares


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_has_its_part_of_the_runbook(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["summary"]
    document, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert anchor == name.lower()
    headings = re.findall(r"^#+ (.+)$", (ROOT / document).read_text(), re.MULTILINE)
    assert name in headings


def test_the_runbook_has_no_alert_that_there_is_not() -> None:
    assert set(re.findall(r"^#+ (Headrace\w+)$", (ROOT / "docs/runbook.md").read_text(), re.M)) == set(ALERTS)


def test_the_command_prints_and_writes_them(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["deploy", "prometheus-rules"])
    assert (printed.exit_code, printed.stdout) == (0, prometheus_rules())
    path = tmp_path / "rules.yaml"
    assert CliRunner().invoke(app, ["deploy", "prometheus-rules", "--output", str(path)]).exit_code == 0
    assert path.read_text() == prometheus_rules()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "rules.yaml"
    failed = CliRunner().invoke(app, ["deploy", "prometheus-rules", "--output", str(path)])
    assert failed.exit_code == 1
    assert str(path) in failed.stderr
