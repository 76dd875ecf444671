"""docs/metrics.md describes what /metrics exposes: names, types and labels, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.cluster.options import AdmissionOptions, DegradeStep, GatewayOptions
from headrace.observe import Metrics
from headrace.observe.metrics import PREFIX
from headrace.protocol.messages import EngineInfo, Role, WorkerInfo

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
INFO = EngineInfo(
    model="m",
    revision="r",
    numerics="n",
    dtype="d",
    batch_invariant=False,
    max_model_len=1,
    vocab_size=1,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    max_waiting=1,
    block_size=1,
    num_blocks=1,
    block_bytes=1,
    weight_bytes=1,
    prefix_caching=False,
    kv_layout="l",
    threads=1,
    pid=1,
)


def exposed() -> dict[str, tuple[str, frozenset[str]]]:
    ladder = (DegradeStep(lower="n", to=1),)
    metrics = Metrics("m", lambda: 0.0, GatewayOptions(admission=AdmissionOptions(degrade=ladder)))
    metrics.engine_up(WorkerInfo(worker_id="w", generation=1, role=Role.BOTH, data_address="", engine=INFO))
    return {
        family.name.removeprefix(PREFIX): (
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels) - {"model_name", "le"},
        )
        for family in metrics.collect()
    }


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\| [^|]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_table_is_what_is_exposed() -> None:
    assert documented() == exposed()


def test_queries_name_what_there_is() -> None:
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    samples = {name + suffix for name, (kind, _) in exposed().items() for suffix in suffixes[kind]}
    named = set(re.findall(rf"{PREFIX}(\w+)", DOCUMENT.read_text()))
    assert len(named) > 10
    assert named <= samples
