"""A sweep as one HTML file that needs nothing else: tables and curves, floor and peers."""

from __future__ import annotations

import html
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import headrace
from headrace.bench.floors import Gpu, Step, step_work, total
from headrace.bench.peers import find_row, peer_rows
from headrace.bench.plots import plot_curves, to_svg
from headrace.models.config import GptOssConfig

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } svg { max-width: 100%; height: auto }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
.plots { display: flex; flex-wrap: wrap } .plots > * { flex: 1 1 20rem }
"""
NOTES = """
<p>Definitions: those of <code>vllm bench serve</code>. Prompts are random tokens, generation goes
on to the full length, greedy, without prefix caching; users ask again as soon as they are
answered. Floor: what one decode step must read or compute, by the speeds measured on this GPU,
for as many users, halfway through the output. TPOT / peer under 1 means that ours is faster.</p>
"""


@dataclass(frozen=True)
class SweepRow:
    """One line of serve.csv."""

    users: int
    input_len: int
    output_len: int
    adapters: int
    output_tok_s: float
    mean_ttft_ms: float
    median_ttft_ms: float
    mean_tpot_ms: float

    @property
    def line(self) -> str:
        """The row for people."""
        return (
            f"{self.users:>4} users, {self.input_len} in / {self.output_len} out, "
            f"{self.adapters} adapters: {self.output_tok_s:,.1f} tok/s, "
            f"TTFT {self.mean_ttft_ms:.1f} ms, TPOT {self.mean_tpot_ms:.2f} ms"
        )


@dataclass(frozen=True)
class Peer:
    """A peer's figures of the same load, None where it was not measured."""

    tpot_ms: float | None
    output_tok_s: float | None


@dataclass(frozen=True)
class Report:
    """A sweep and what it was run on."""

    model: str
    device: str
    gpu: Gpu | None  # None: its speeds were not measured, there is no floor
    config: GptOssConfig
    rank: int  # of the adapters
    rows: Sequence[SweepRow]

    def floor_ms(self, row: SweepRow) -> float | None:
        """Least TPOT of the base: a decode step of all users, halfway through the output."""
        if self.gpu is None or row.adapters:
            return None
        step = Step(row.users, 1, row.input_len + row.output_len / 2)
        return 1000 * total(step_work(self.config, step)).floor_s(self.gpu)

    def peer(self, row: SweepRow) -> Peer:
        """The peer's serving figures, or its decode step of the same batch and prompt."""
        gpu = self.gpu.name if self.gpu else None
        served = find_row(
            peer_rows("serve", self.config, gpu), users=row.users, adapters=row.adapters,
            input_len=row.input_len, output_len=row.output_len,
        )  # fmt: skip
        if served is not None:
            return Peer(served["mean_tpot_ms"], served["output_tok_s"])
        offline = find_row(
            peer_rows("latency", self.config, gpu), batch=row.users, adapters=row.adapters,
            rank=self.rank if row.adapters else 0, prompt=row.input_len,
        )  # fmt: skip
        return Peer(offline["tpot_ms"] if offline else None, None)


def write_report(path: Path, report: Report) -> None:
    """Write the HTML file."""
    title = f"{report.model} on {report.device}"
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "triton"))
    about = (
        f"{date.today()}, headrace {headrace.__version__}, {versions}, "
        f"Python {platform.python_version()}"
    )
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{NOTES}"
    ]
    for adapters in sorted({row.adapters for row in report.rows}):
        rows = [row for row in report.rows if row.adapters == adapters]
        parts.append(f"<h2>{f'{adapters} adapters' if adapters else 'Base model'}</h2>")
        parts.append(html_table(report, rows))
    parts.append(f"<div class='plots'>{''.join(plots(report))}</div></html>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def installed(name: str) -> str:
    """Return a package's version."""
    try:
        return version(name)
    except ModuleNotFoundError:
        return "not installed"


Curves = Mapping[str, Callable[[SweepRow], float | None]]
COLUMNS = (
    "users", "in", "out", "tok/s", "peer tok/s", "mean TTFT ms", "median TTFT ms", "TPOT ms",
    "floor ms", "TPOT / floor", "peer TPOT ms", "TPOT / peer",
)  # fmt: skip


def html_table(report: Report, rows: Sequence[SweepRow]) -> str:
    """All loads, each with its floor and peer."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{column}</th>" for column in COLUMNS) + "</tr>"]
    for row in rows:
        floor, peer = report.floor_ms(row), report.peer(row)
        cells = [
            f"{row.users}", f"{row.input_len}", f"{row.output_len}", f"{row.output_tok_s:,.0f}",
            number(peer.output_tok_s, ",.0f"), f"{row.mean_ttft_ms:.1f}",
            f"{row.median_ttft_ms:.1f}", f"{row.mean_tpot_ms:.2f}",
            number(floor), number(ratio(row.mean_tpot_ms, floor)),
            number(peer.tpot_ms), number(ratio(row.mean_tpot_ms, peer.tpot_ms)),
        ]  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def number(value: float | None, form: str = ".2f") -> str:
    """Show a figure that may be missing."""
    return "" if value is None else f"{value:{form}}"


def ratio(ours: float, other: float | None) -> float | None:
    """Ours over the other, where there is one."""
    return None if other is None else ours / other


def plots(report: Report) -> list[str]:
    """Curves against the number of users, of the loads that differ in nothing else."""
    first = report.rows[0]
    lengths = (first.input_len, first.output_len)
    rows = [row for row in report.rows if (row.input_len, row.output_len) == lengths]
    tpot: Curves = {
        "": lambda row: row.mean_tpot_ms,
        "floor": report.floor_ms,
        "peer": lambda row: report.peer(row).tpot_ms,
    }
    throughput: Curves = {
        "": lambda row: row.output_tok_s,
        "peer": lambda row: report.peer(row).output_tok_s,
    }
    ttft: Curves = {"": lambda row: row.median_ttft_ms}
    return [
        plot(rows, tpot, "mean TPOT, ms"),
        plot(rows, throughput, "output tok/s"),
        plot(rows, ttft, "median TTFT, ms"),
    ]


def plot(rows: Sequence[SweepRow], curves: Curves, label: str) -> str:
    """Draw our curve ("") and the others, for the base and with adapters; return SVG."""
    points = {}
    for adapters in sorted({row.adapters for row in rows}):
        kind = f"{adapters} adapters" if adapters else "base"
        for name, value in curves.items():
            mine = [(r.users, value(r)) for r in rows if r.adapters == adapters]
            known = [(x, y) for x, y in mine if y]  # logarithmic axes have no 0
            if known:
                points[f"({name}, {kind})" if name else kind] = known
    return to_svg(plot_curves(points, "users", label))
