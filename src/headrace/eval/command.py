"""The command line of `headrace eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.eval.config import EvalConfig
from headrace.files import BUNDLED_MODEL
from headrace.flags import with_configs


@with_configs(config=EvalConfig)
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="checkpoint directory", show_default="the bundled model")
    ] = BUNDLED_MODEL,
    *,
    config: EvalConfig,
) -> None:
    """Measure accuracy with lm-eval, of a model and its adapters, through a server."""
    from headrace.eval.run import run_eval

    run_eval(config, checkpoint)
