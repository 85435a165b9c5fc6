"""The `headrace lora` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.config import EngineConfig

app = typer.Typer(help="Look at LoRA adapters.", no_args_is_help=True)


@app.callback()
def lora() -> None:
    """Look at LoRA adapters."""


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="directory of the adapter, as PEFT saves it")],
    model: Annotated[
        Path | None,
        typer.Option(help="checkpoint directory (default: the base that the adapter names)"),
    ] = None,
    max_lora_rank: Annotated[
        int, typer.Option(help="the server's flag", min=1, max=512)
    ] = EngineConfig.max_lora_rank,
) -> None:
    """Say what an adapter holds and whether it would load."""
    from headrace.lora.report import find_model, report

    report(Console(), path, model or find_model(path), max_lora_rank)
