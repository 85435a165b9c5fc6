"""Figures of benchmark runs, with matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.bench.serve_metrics import LABELS, Summary, Timeline, per_second
from headrace.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def need_matplotlib() -> None:
    """Raise ConfigError where plots can't be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'headrace[bench]'")


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure without a window, and its array of axes."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def plot_run(timelines: Sequence[Timeline], summary: Summary, stem: Path) -> list[Path]:
    """Write STEM-latencies.png and STEM-throughput.png; return their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, made in [
        ("latencies", plot_latencies(summary)),
        ("throughput", plot_throughput(timelines)),
    ]:
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        made.savefig(paths[-1], dpi=120)
    return paths


def plot_latencies(summary: Summary) -> Figure:
    """Draw the distribution of each latency: how many of its values are below x."""
    made, axes = figure(9, 6, 2, 2)
    for axis, (metric, (title, short)) in zip(axes.flat, LABELS.items(), strict=True):
        values = np.sort(summary.values[metric])
        axis.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post")
        axis.axvline(summary.median(metric), linestyle=":", color="gray", linewidth=1)
        axis.set(title=title, xlabel=f"{short}, ms", ylabel="share below", ylim=(0, 1))
        axis.grid(alpha=0.3)
    return made


def plot_throughput(timelines: Sequence[Timeline]) -> Figure:
    """Draw output tokens per second and requests in flight over the run."""
    made, axes = figure(9, 5, 2)
    chunks, requests = per_second(timelines)
    seconds = np.arange(len(chunks))
    for axis, values, label in [
        (axes[0][0], chunks, "output tok/s"),
        (axes[1][0], requests, "requests in flight"),
    ]:
        axis.step(seconds, values, where="post")
        axis.set(ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[1][0].set_xlabel("seconds since the first request")
    return made


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str
) -> Figure:
    """Draw named curves (x, y) on logarithmic axes; names in brackets are dashed."""
    made, axes = figure(6, 4)
    axis = axes[0][0]
    for name, points in curves.items():
        style = "--" if name.startswith("(") else "-"
        axis.plot(*np.transpose(points), style, marker="o", markersize=3, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")
    if curves:
        axis.legend(fontsize="small")
    return made


def to_svg(made: Figure) -> str:
    """Return a figure as an SVG element to put into HTML, the same for the same data."""
    text = io.StringIO()
    made.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
