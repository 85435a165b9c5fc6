"""What `headrace serve` says of its own start."""

from __future__ import annotations

from rich.table import Table

from headrace.engine.phases import StartReport

GIB = 2**30


def start_table(report: StartReport, server: float, total: float) -> Table:
    """Seconds by phase, in their order, and what the phase made.

    server: seconds until the engine's process was started; all that is in no phase is `other`.
    """
    made = {
        "weights": f"{report.weight_bytes / GIB:.2f} GiB" if report.weight_bytes else "",
        "adapters": f"{report.adapter_bytes / GIB:.2f} GiB" if report.adapter_bytes else "",
        "kernels": f"{report.num_kernels}, {report.num_compiled} of them compiled now",
        "cache": f"{report.cache_bytes / GIB:.2f} GiB, {report.cache_tokens:,} tokens",
    }
    table = Table(title="Start")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("")
    table.add_row("server", f"{server:.2f}", "")
    for phase, seconds in report.phases.items():
        table.add_row(phase, f"{seconds:.2f}", made.get(phase, ""))
    table.add_row("other", f"{max(total - server - sum(report.phases.values()), 0):.2f}", "")
    table.add_section()
    table.add_row("in all", f"{total:.2f}", "")
    return table
