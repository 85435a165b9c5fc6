"""The `headrace` command: serve, generate, profile, eval, bench, lora, doctor, version."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace import __version__
from headrace.bench.commands import app as bench_app
from headrace.bench.commands import profile
from headrace.config import ConfigError, EngineConfig, ServerConfig
from headrace.eval.command import evaluate
from headrace.files import BUNDLED_MODEL
from headrace.flags import ListOptions, with_configs
from headrace.lora.commands import app as lora_app

app = typer.Typer(
    help="Serve mixture-of-experts language models in MXFP4.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.command()(profile)
app.command("eval", cls=ListOptions)(evaluate)
app.add_typer(lora_app, name="lora")


def main() -> None:
    """Run the command line; a caller's mistake is one line on stderr and exit status 2."""
    try:
        app()
    except ConfigError as error:
        print(f"headrace: {error}", file=sys.stderr)
        sys.exit(2)


@app.command(cls=ListOptions)
@with_configs(engine=EngineConfig, server=ServerConfig)
def serve(
    model: Annotated[
        Path, typer.Argument(help="checkpoint directory", show_default="the bundled model")
    ] = BUNDLED_MODEL,
    *,
    engine: EngineConfig,
    server: ServerConfig,
) -> None:
    """Serve a model with the OpenAI API."""
    from headrace.server.run import run_server

    sys.exit(run_server(engine, server))


@app.command()
@with_configs(engine=EngineConfig)
def generate(
    prompt: Annotated[str, typer.Argument(help="what to ask")],
    model: Annotated[
        Path, typer.Option(help="checkpoint directory", show_default="bundled")
    ] = BUNDLED_MODEL,
    max_tokens: Annotated[int, typer.Option(help="most tokens to write", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    *,
    engine: EngineConfig,
) -> None:
    """Ask a model one question, without a server, and print its answer as it comes."""
    from headrace.generate import ask

    ask(Console(), engine, prompt, max_tokens, temperature)


@app.command()
def doctor() -> None:
    """Say what this machine can run."""
    from headrace.doctor import run_doctor

    run_doctor(Console())


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
