"""Counters, gauges and histograms that cost next to nothing to move.

In: numbers, on one event loop. Out: prometheus_client's metric families, which it writes as text. Its own
metrics take a lock and walk all buckets for each number; these are plain numbers behind a bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

Labels = dict[str, str]


class Counter:
    """A total that only grows."""

    __slots__ = ("name", "text", "value")

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text, self.value = name, text, 0.0

    def family(self, labels: Labels) -> Metric:
        family = CounterMetricFamily(self.name, self.text, labels=list(labels))
        family.add_metric(list(labels.values()), self.value)
        return family


class _By:
    """A number for each combination of the values of some labels, all of which are known beforehand."""

    __slots__ = ("labels", "name", "text", "values")
    _family: type[CounterMetricFamily] | type[GaugeMetricFamily]

    def __init__(self, name: str, text: str, labels: Mapping[str, Iterable[str]]) -> None:
        self.name, self.text, self.labels = name, text, tuple(labels)
        self.values = dict.fromkeys(product(*labels.values()), 0.0)
        """By the values of the labels, in their order."""

    def family(self, labels: Labels) -> Metric:
        family = self._family(self.name, self.text, labels=[*labels, *self.labels])
        for values, number in self.values.items():
            family.add_metric([*labels.values(), *values], number)
        return family


class CounterBy(_By):
    """Totals that only grow."""

    __slots__ = ()
    _family = CounterMetricFamily


class GaugeBy(_By):
    """Numbers that are now so."""

    __slots__ = ()
    _family = GaugeMetricFamily


class Gauge:
    """A number that is now so."""

    __slots__ = ("name", "text", "value")

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text, self.value = name, text, 0.0

    def family(self, labels: Labels) -> Metric:
        family = GaugeMetricFamily(self.name, self.text, labels=list(labels))
        family.add_metric(list(labels.values()), self.value)
        return family


class Info:
    """Facts as labels of a gauge that is 1; not exposed until they are known."""

    __slots__ = ("facts", "name", "text")

    def __init__(self, name: str, text: str, facts: Labels | None = None) -> None:
        self.name, self.text, self.facts = name, text, facts

    def family(self, labels: Labels) -> Metric:
        facts = labels | (self.facts or {})
        family = GaugeMetricFamily(self.name, self.text, labels=list(facts))
        if self.facts is not None:
            family.add_metric(list(facts.values()), 1.0)
        return family


class Histogram:
    """How often which sizes were seen. `buckets` are upper bounds, inclusive and ascending."""

    __slots__ = ("_bounds", "_counts", "_sum", "name", "text")

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self.name, self.text = name, text
        self._bounds = [float(bound) for bound in buckets]
        self._counts = [0] * (len(self._bounds) + 1)  # the last is above every bound
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, so many `times`."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, labels: Labels) -> Metric:
        family = HistogramMetricFamily(self.name, self.text, labels=list(labels))
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class HistogramBy:
    """A histogram for each value of one label, all of which are known beforehand."""

    __slots__ = ("each", "label", "name", "text")

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], label: str, values: Iterable[str]
    ) -> None:
        self.name, self.text, self.label = name, text, label
        self.each = {value: Histogram(name, text, buckets) for value in values}

    def family(self, labels: Labels) -> Metric:
        family = HistogramMetricFamily(self.name, self.text, labels=[*labels, self.label])
        for value, histogram in self.each.items():
            histogram.name = self.name
            family.samples += histogram.family({**labels, self.label: value}).samples
        return family


Instrument = Counter | CounterBy | Gauge | GaugeBy | Info | Histogram | HistogramBy
