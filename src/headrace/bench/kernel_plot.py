"""The figure of one op: time against the number of tokens, with the floor under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headrace.bench.kernels import KernelRow
from headrace.bench.plots import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_op(op: str, rows: Sequence[KernelRow]) -> Figure:
    """A curve for each value of the labels; dashed its floor, crosses its peer."""
    made, axes = figure(8, 5)
    axis = axes[0, 0]
    curves: dict[str, list[KernelRow]] = {}
    for row in rows:
        name = " ".join(f"{k}={v}" for k, v in row.labels.items())
        curves.setdefault(name, []).append(row)
    for name, curve in curves.items():
        (line,) = axis.plot([r.m for r in curve], [r.us for r in curve], marker="o", label=name)
        floor = [(r.m, r.floor_us) for r in curve if r.floor_us is not None]
        if floor:
            axis.plot(*zip(*floor, strict=True), linestyle="--", color=line.get_color())
        peer = [(r.m, r.peer_us) for r in curve if r.peer_us is not None]
        if peer:
            axis.plot(
                *zip(*peer, strict=True), linestyle="", marker="x", color=line.get_color(),
                label=f"{name} {curve[0].peer}",
            )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(title=f"{op} (dashed: floor)", xlabel="tokens", ylabel="us")
    axis.grid(alpha=0.3)
    axis.legend()
    return made
