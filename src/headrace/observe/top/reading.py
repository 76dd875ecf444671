"""What a server answers at one moment: its workers, and the totals of its metrics.

In: the JSON of /cluster and the text of /metrics. Out: a `Reading`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from headrace.observe.metrics import PREFIX

Labels = tuple[tuple[str, str], ...]
_NONE: Mapping[Labels, float] = {}


@dataclass(frozen=True, slots=True)
class Distribution:
    """Sizes that were seen, counted up to each of ascending bounds."""

    bounds: tuple[float, ...] = ()
    """The last is infinity."""
    up_to: tuple[float, ...] = ()
    """For each bound, how many were not above it."""

    @property
    def count(self) -> float:
        return self.up_to[-1] if self.up_to else 0.0

    def since(self, earlier: Distribution) -> Distribution:
        """What came after `earlier`."""
        if earlier.bounds != self.bounds:
            return self
        came = tuple(now - before for now, before in zip(self.up_to, earlier.up_to, strict=True))
        return Distribution(self.bounds, came)

    def quantile(self, share: float) -> float | None:
        """The size that `share` of all are not above, interpolated within its bucket as PromQL does.

        Infinity where it is above every finite bound; None where nothing was seen.
        """
        if not self.count:
            return None
        wanted, below, low = share * self.count, 0.0, 0.0
        for bound, up_to in zip(self.bounds, self.up_to, strict=True):
            if up_to >= wanted and up_to > below:
                return (
                    bound if math.isinf(bound) else low + (bound - low) * (wanted - below) / (up_to - below)
                )
            below, low = up_to, bound
        return math.inf


@dataclass(frozen=True, slots=True)
class Reading:
    """One moment. Metrics by name, without prefix and suffix."""

    at_s: float
    """Of the reader's monotonic clock."""
    cluster: Mapping[str, Any]
    """The answer of /cluster."""
    values: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)
    """Counters and gauges, of all models together, by their labels apart from the model's name."""
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    model: str = ""
    """The names of all, in words."""

    @classmethod
    def of(cls, at_s: float, cluster: Mapping[str, Any], metrics: str) -> Reading:
        """Raises ValueError for metrics that are not in Prometheus' text format."""
        values: dict[str, dict[Labels, float]] = {}
        distributions: dict[str, Distribution] = {}
        models: dict[str, None] = {}
        for family in text_string_to_metric_families(metrics):
            name = family.name.removeprefix(PREFIX)
            if name == family.name:
                continue
            buckets: dict[float, float] = {}
            for sample in family.samples:
                labels = dict(sample.labels)
                if (model := labels.pop("model_name", None)) is not None:
                    models[model] = None
                if sample.name.endswith("_bucket"):
                    bound = float(labels["le"])
                    buckets[bound] = buckets.get(bound, 0.0) + sample.value
                elif not sample.name.endswith(("_sum", "_count", "_created")):
                    of_name, key = values.setdefault(name, {}), tuple(sorted(labels.items()))
                    of_name[key] = of_name.get(key, 0.0) + sample.value
            if buckets:
                bounds, up_to = zip(*sorted(buckets.items()), strict=True)
                distributions[name] = Distribution(bounds, up_to)
        return cls(at_s, cluster, values, distributions, ", ".join(models))

    def total(self, name: str) -> float:
        """A counter or gauge, summed over its labels; 0 for one that the server does not have."""
        return sum(self.values.get(name, _NONE).values())

    def value(self, name: str, labels: Labels) -> float:
        """A counter or gauge at labels, which are in order of their names; 0 where there is none."""
        return self.values.get(name, _NONE).get(labels, 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The same, by the values of one label."""
        found: dict[str, float] = {}
        for labels, value in self.values.get(name, _NONE).items():
            key = dict(labels).get(label, "")
            found[key] = found.get(key, 0.0) + value
        return found

    def distribution(self, name: str) -> Distribution:
        return self.distributions.get(name, Distribution())
