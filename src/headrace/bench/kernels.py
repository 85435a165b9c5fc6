"""Time every op at a list of sizes, against its floor and what peers need for it.

The result of each is checked before it is timed; `headrace.bench.case` says how that is done.
"""

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import headrace.bench
from headrace.bench.case import Case, CaseModule, need_gpu, time_us
from headrace.bench.floors import Gpu, find_gpu
from headrace.config import ConfigError

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MOST_TOLD = 600  # characters of an error: a compiler's can be pages


T = TypeVar("T")


@dataclass(frozen=True)
class KernelRow:
    """One size of one op. floor and peer are None where nobody has measured."""

    labels: dict[str, int | str]
    m: int  # tokens
    us: float
    floor_us: float | None
    peer: str | None
    peer_us: float | None
    tb_per_s: float
    tflop_per_s: float

    @property
    def share(self) -> float | None:
        """Of the floor: 1 is as fast as can be."""
        return None if self.floor_us is None else self.floor_us / self.us

    def columns(self) -> dict[str, Any]:
        """A line of the CSV file."""
        return {
            **self.labels,
            "m": self.m,
            "us": round(self.us, 2),
            "floor_us": _rounded(self.floor_us, 2),
            "share": _rounded(self.share, 3),
            "peer": self.peer,
            "peer_us": self.peer_us,
            "tb_per_s": round(self.tb_per_s, 3),
            "tflop_per_s": round(self.tflop_per_s, 1),
        }


def run_kernels(
    console: Console, ops: Sequence[str], sizes: Sequence[int], out: Path | None
) -> int:
    """Time the named ops (none: all), print a table, write a CSV file and a plot each to `out`.

    Returns the exit status: 1 if some cases had wrong results or did not run. Raises ConfigError
    if there is no GPU, no such op, or plots are wanted and matplotlib is missing.
    """
    need_gpu("kernels")
    if out is not None:
        from headrace.bench.plots import need_matplotlib

        need_matplotlib()
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    gpu = find_gpu(name)
    console.print(f"{name}, torch {torch.__version__}")
    rows: dict[str, list[KernelRow]] = {}
    failures = Failures(console)
    for module in modules_of(case_modules(), ops):
        cases = module.cases(sizes, torch.device("cuda"))
        while case := failures.attempt(f"cases of {module.OPS}", partial(next, cases, None)):
            if ops and case.op not in ops:
                continue
            row = failures.attempt(f"{case.name} m={case.num_tokens}", partial(measured, case, gpu))
            if row is None:
                continue
            console.print(f"{case.name} m={row.m}: {row.us:.2f} us")
            rows.setdefault(case.op, []).append(row)
            if out is not None:
                write_rows(out / f"{case.op}.csv", rows[case.op])
    report(console, rows, out)
    if failures.count:
        console.print(f"{failures.count} failed, see above", style="red")
    return min(failures.count, 1)


class Failures:
    """Prints and counts what went wrong: one broken op must not cost the others their figures."""

    def __init__(self, console: Console) -> None:
        self.count = 0
        self._console = console

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """Its result, or None if it raises an error."""
        try:
            return work()
        except Exception as error:
            self.count += 1
            text = f"{what}: {type(error).__name__}: {error}"[:MOST_TOLD]
            self._console.print(text, style="red", markup=False)
            return None


def case_modules() -> list[CaseModule]:
    """The modules headrace.bench.cases_*."""
    names = [m.name for m in pkgutil.iter_modules(headrace.bench.__path__)]
    return [importlib.import_module(f"headrace.bench.{n}") for n in names if n.startswith("cases_")]


def modules_of(modules: Sequence[CaseModule], ops: Sequence[str]) -> list[CaseModule]:
    """Those with one of these ops, or all; raises ConfigError for an op that no module has."""
    known = {op for module in modules for op in module.OPS}
    if unknown := set(ops) - known:
        raise ConfigError(
            f"no op {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    return [module for module in modules if not ops or set(ops) & set(module.OPS)]


def measured(case: Case, gpu: Gpu | None) -> KernelRow:
    """Check one case, then time it."""
    case.check()
    us = time_us(case)
    peer, peer_us = peer_of(case, gpu)
    return KernelRow(
        labels=dict(case.labels),
        m=case.num_tokens,
        us=us,
        floor_us=1e6 * case.work.floor_s(gpu) if gpu else None,
        peer=peer,
        peer_us=peer_us,
        tb_per_s=case.num_bytes / us / 1e6,
        tflop_per_s=case.num_flops / us / 1e6,
    )


def peer_of(case: Case, gpu: Gpu | None) -> tuple[str | None, float | None]:
    """Who else was measured on this GPU, and its time in us."""
    text = (resources.files("headrace") / "bench" / "peers_kernels.json").read_text()
    peers = json.loads(text)
    for peer in peers["peers"] if gpu and gpu.name == peers["source"]["gpu"] else []:
        if peer["op"] == case.op and peer["labels"] == dict(case.labels):
            us = peer["us"].get(str(case.num_tokens))
            return (peer["peer"], us) if us else (None, None)
    return None, None


def report(console: Console, rows: dict[str, list[KernelRow]], out: Path | None) -> None:
    """Print a table an op; with `out`, write their plots too."""
    for op, of_op in rows.items():
        console.print(op_table(op, of_op))
        if out is not None and len({row.m for row in of_op}) > 1:
            from headrace.bench.kernel_plot import plot_op

            plot_op(op, of_op).savefig(out / f"{op}.png", dpi=120)


def op_table(op: str, rows: Sequence[KernelRow]) -> Table:
    """The rows of one op for the terminal."""
    table = Table(
        "m", "us", "floor us", "share", "TB/s", "TFLOP/s", "peer us", "us / peer", title=op
    )
    labels = None
    for row in rows:
        if row.labels != labels:
            labels = row.labels
            table.add_section()
            table.add_row(" ".join(f"{k}={v}" for k, v in labels.items()))
        ratio = None if row.peer_us is None else row.us / row.peer_us
        table.add_row(
            str(row.m), f"{row.us:.1f}", _text(row.floor_us, 1), _text(row.share, 2),
            f"{row.tb_per_s:.2f}", f"{row.tflop_per_s:.1f}", _text(row.peer_us, 1), _text(ratio, 2),
        )  # fmt: skip
    return table


def write_rows(path: Path, rows: Sequence[KernelRow]) -> None:
    """Write a CSV file and its folder; after every row, so that a run cut short keeps its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row.columns() for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
