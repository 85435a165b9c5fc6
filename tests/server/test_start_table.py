from __future__ import annotations

import io

from rich.console import Console

from headrace.engine.phases import StartReport
from headrace.server.start_table import start_table


def lines_of(report: StartReport, total: float) -> list[list[str]]:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(start_table(report, 1.5, total))
    rows = console.export_text().replace("┃", "│").splitlines()
    return [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]


def test_each_phase_has_its_seconds_and_what_it_made() -> None:
    report = StartReport(
        {"imports": 2.0, "weights": 3.25, "kernels": 1.0, "graphs": 0.5, "cache": 0.25},
        weight_bytes=13 * 2**30,
        cache_bytes=2**29,
        cache_tokens=123456,
        num_kernels=60,
        num_compiled=7,
    )
    lines = lines_of(report, total=9.5)
    assert ["server", "1.50", ""] in lines
    assert ["imports", "2.00", ""] in lines
    assert ["weights", "3.25", "13.00 GiB"] in lines
    assert ["kernels", "1.00", "60, 7 of them compiled now"] in lines
    assert ["graphs", "0.50", ""] in lines
    assert ["cache", "0.25", "0.50 GiB, 123,456 tokens"] in lines
    assert ["other", "1.00", ""] in lines
    assert ["in all", "9.50", ""] in lines
