"""The `headrace bench` commands; each imports its module only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from headrace.bench.list_options import ListOptions
from headrace.bench.serve_config import ServeBenchConfig
from headrace.flags import with_configs

app = typer.Typer(help="Measure kernels, the engine and a server.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure kernels, the engine and a server."""


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="directory to write")],
    size: Annotated[Literal["20b", "120b", "tiny"], typer.Option(help="which gpt-oss")] = "20b",
    seed: Annotated[int, typer.Option(help="other weights", min=0)] = 0,
) -> None:
    """Write a random gpt-oss checkpoint in the public layout."""
    from headrace.bench.synth import SIZES, write_synthetic

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"writing {out}", total=None)
        write_synthetic(out, SIZES[size], seed, lambda d, t: bar.update(task, completed=d, total=t))


@app.command(cls=ListOptions)
@with_configs(config=ServeBenchConfig)
def serve(*, config: ServeBenchConfig) -> None:
    """Put load on a running server and print throughput and latencies."""
    from headrace.bench.serve import run_serve

    raise typer.Exit(run_serve(config))
