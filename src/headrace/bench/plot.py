"""A run over time, as a picture: latency percentiles above, throughput and requests under way below.

In: records. Out: a PNG. matplotlib is loaded when a plot is asked for, and only then.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.bench.errors import BenchError
from headrace.bench.record import Record

MAX_WINDOWS = 60
MIN_WINDOW_S = 0.25
POINTS_PER_WINDOW = 8
"""Fewer make no percentile."""

_PERCENTILES = (50, 90, 99)


def check_plot(path: Path) -> None:
    """Raise BenchError, before anything is measured, if there can be no plot at `path`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib, which is not installed: pip install 'headrace[bench]'")
    if path.suffix.lower() != ".png":
        raise BenchError(f"--plot writes PNG files; {path} does not end in .png")


def windows(duration_s: float, points: int) -> NDArray[np.float64]:
    """The borders of the windows in which a run is looked at, in seconds from its beginning."""
    count = max(1, min(MAX_WINDOWS, int(duration_s / MIN_WINDOW_S), points // POINTS_PER_WINDOW))
    return np.linspace(0.0, max(duration_s, 1e-9), count + 1)


def percentiles_by_window(
    at_s: Sequence[float], values: Sequence[float], borders: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p50, p90 and p99 of the values of each window: [3, windows], NaN where a window has none."""
    out = np.full((len(_PERCENTILES), len(borders) - 1), np.nan)
    place = np.clip(np.searchsorted(borders, at_s, side="right") - 1, 0, len(borders) - 2)
    array = np.asarray(values)
    for window in np.unique(place):
        out[:, window] = np.percentile(array[place == window], _PERCENTILES)
    return out


def write_plot(records: Sequence[Record], began_s: float, duration_s: float, title: str, path: Path) -> None:
    """Draw completed requests at the time of their first token (TTFT), last token (TPOT), and chunks
    (throughput).

    Raises BenchError when `path` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [record for record in records if record.completed]
    chunks = sum(len(record.times) for record in done)
    borders = windows(duration_s, chunks)
    middles, width = (borders[1:] + borders[:-1]) / 2, borders[1] - borders[0]
    tokens = np.histogram(
        [at - began_s for record in done for at in record.times],
        borders,
        weights=[size for record in done for size in record.sizes],
    )[0]
    sent = np.sort([r.sent_s - began_s for r in records if r.sent_s is not None])
    ended = np.sort([r.ended_s - began_s for r in records if r.sent_s is not None and r.ended_s is not None])
    under_way = np.searchsorted(sent, middles) - np.searchsorted(ended, middles)
    latencies = (
        ("TTFT (ms)", [(r.times[0] - began_s, r.ttft_s) for r in done]),
        ("TPOT (ms)", [(r.times[-1] - began_s, r.tpot_s) for r in done]),
    )

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(10, 9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, (name, points) in zip(axes, latencies, strict=False):
        axis.set_ylabel(name)
        known = [(at, value * 1e3) for at, value in points if value is not None]
        if not known:
            continue
        coarse = windows(duration_s, len(known))
        centres = (coarse[1:] + coarse[:-1]) / 2
        lines = percentiles_by_window([at for at, _ in known], [value for _, value in known], coarse)
        for percentile, line in zip(_PERCENTILES, lines, strict=True):
            there = ~np.isnan(line)
            axis.plot(centres[there], line[there], marker=".", label=f"p{percentile}")
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left")
    axes[2].step(middles, tokens / width, where="mid", label="output tokens/s")
    axes[2].set_ylabel("output tokens/s")
    axes[2].set_ylim(bottom=0)
    axes[2].set_xlabel("seconds")
    requests = axes[2].twinx()
    requests.plot(middles, under_way, color="tab:gray", label="requests under way")
    requests.set_ylabel("requests under way")
    for axis in axes:
        axis.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
