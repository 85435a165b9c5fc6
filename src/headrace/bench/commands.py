"""The `headrace bench` commands; each imports its module only when it runs."""

from __future__ import annotations

import typer

app = typer.Typer(help="Measure kernels, the engine and a server.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure kernels, the engine and a server."""
