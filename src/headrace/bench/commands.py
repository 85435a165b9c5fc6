"""The `headrace bench` commands; each imports its module only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from headrace.bench.serve_config import ServeBenchConfig
from headrace.config import EngineConfig
from headrace.files import BUNDLED_MODEL
from headrace.flags import ListOptions, with_configs

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


@app.command()
def synth_adapter(
    model: Annotated[Path, typer.Argument(help="checkpoint directory")],
    out: Annotated[Path, typer.Argument(help="directory to write")],
    rank: Annotated[int, typer.Option(help="of every target", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="other weights", min=0)] = 0,
) -> None:
    """Write a random adapter on attention and all experts of a checkpoint, in PEFT's layout."""
    from headrace.bench.synth_adapter import write_adapter
    from headrace.models.config import read_config

    write_adapter(out, read_config(model), rank, seed)


@app.command(cls=ListOptions)
@with_configs(config=ServeBenchConfig)
def serve(*, config: ServeBenchConfig) -> None:
    """Put load on a running server and print throughput and latencies."""
    from headrace.bench.serve import run_serve

    raise typer.Exit(run_serve(config))


@app.command()
@with_configs(engine=EngineConfig)
def latency(
    model: Annotated[
        Path, typer.Argument(help="checkpoint directory", show_default="the bundled model")
    ] = BUNDLED_MODEL,
    batch: Annotated[str, typer.Option(help="requests at once")] = "1,2,4,8,16,32,64,128",
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 512,
    output: Annotated[int, typer.Option(help="tokens of an answer")] = 128,
    adapters: Annotated[int, typer.Option(help="random adapters, in turn")] = 0,
    rank: Annotated[int, typer.Option(help="of the adapters")] = 0,
    csv: Annotated[Path | None, typer.Option(help="file for the results")] = None,
    *,
    engine: EngineConfig,
) -> None:
    """Time a token and a prefill at each batch size, without a server."""
    from headrace.bench.latency import Workload, parse_sizes, run_latency

    workload = Workload(parse_sizes(batch), prompt, output, adapters, rank)
    raise typer.Exit(run_latency(engine, workload, csv))


@app.command(cls=ListOptions)
def sweep(
    model: Annotated[
        Path, typer.Argument(help="checkpoint directory", show_default="the bundled model")
    ] = BUNDLED_MODEL,
    users: Annotated[str, typer.Option(help="how many ask at once")] = "1,2,4,8,16,32,64,128",
    input_len: Annotated[int, typer.Option(help="tokens of a prompt", min=1)] = 512,
    output_len: Annotated[int, typer.Option(help="tokens to generate", min=1)] = 128,
    prompts_per_user: Annotated[int, typer.Option(help="requests for each user", min=1)] = 5,
    lora_modules: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of adapters, measured after the base")
    ] = None,
    serve_args: Annotated[str, typer.Option(help="more flags of headrace serve")] = "",
    start_timeout: Annotated[float, typer.Option(help="seconds the server may take")] = 600,
    out: Annotated[
        Path | None, typer.Option(help="directory to write", show_default="bench/results/GPU")
    ] = None,
) -> None:
    """Start a server, measure it with more and more users, write serve.csv and serve.html."""
    from headrace.bench.sweep import Sweep, parse_users, run_sweep

    loras = tuple(lora_modules or ())
    sizes = (input_len, output_len, prompts_per_user)
    plan = Sweep(model, parse_users(users), *sizes, loras, serve_args, start_timeout)
    raise typer.Exit(run_sweep(plan, out))


@app.command(cls=ListOptions)
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="only these", show_default="all")] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="tokens", show_default="1 2 4 ... 8192", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="directory to write CSV files and plots to")
    ] = None,
) -> None:
    """Time every op on this GPU, against its floor and what peers need for it."""
    from headrace.bench.kernels import SIZES, run_kernels

    raise typer.Exit(run_kernels(Console(), op or (), size or SIZES, out))


@app.command(cls=ListOptions)
def tune(
    out: Annotated[Path, typer.Option(help="directory to write tune.csv to")],
    size: Annotated[
        list[int] | None, typer.Option(help="tokens", show_default="1 2 4 ... 8192", min=1)
    ] = None,
) -> None:
    """Time the expert matmuls with every tile worth a try, for headrace.ops.tiles."""
    from headrace.bench.kernels import SIZES
    from headrace.bench.tune import run_tune

    run_tune(Console(), size or SIZES, out)


@app.command(cls=ListOptions)
def tune_linear(
    out: Annotated[Path, typer.Option(help="directory to write tune_linear.csv to")],
    size: Annotated[
        list[int] | None, typer.Option(help="tokens", show_default="1 2 4 ... 8192", min=1)
    ] = None,
) -> None:
    """Time the dense layers with every tile worth a try, for headrace.ops.linear_tiles."""
    from headrace.bench.tune_linear import SIZES, run_tune_linear

    run_tune_linear(Console(), size or SIZES, out)


@app.command()
def startup(
    model: Annotated[
        Path, typer.Argument(help="checkpoint directory", show_default="the bundled model")
    ] = BUNDLED_MODEL,
    flags: Annotated[
        list[str] | None, typer.Argument(help="after --: flags of `headrace serve`")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="file for the results")] = None,
) -> None:
    """Time a server's start to its first answer, without and with its caches."""
    from headrace.bench.startup import run_startup

    run_startup(model, flags or [], csv)


@with_configs(engine=EngineConfig)
def profile(
    model: Annotated[
        Path, typer.Argument(help="checkpoint directory", show_default="the bundled model")
    ] = BUNDLED_MODEL,
    batch: Annotated[str, typer.Option(help="requests that decode")] = "1,16,64",
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 512,
    csv: Annotated[Path | None, typer.Option(help="file for the results")] = None,
    *,
    engine: EngineConfig,
) -> None:
    """Take one decode step and one prefill apart, kernel by kernel."""
    from headrace.bench.latency import parse_sizes
    from headrace.bench.profile import run_profile

    run_profile(engine, parse_sizes(batch), prompt, csv)


@app.command()
@with_configs(engine=EngineConfig)
def adapter_load(
    model: Annotated[
        Path, typer.Argument(help="checkpoint directory", show_default="the bundled model")
    ] = BUNDLED_MODEL,
    rank: Annotated[int, typer.Option(help="of the adapter", min=1, max=512)] = 64,
    batch: Annotated[int, typer.Option(help="requests that decode meanwhile", min=1)] = 8,
    csv: Annotated[Path | None, typer.Option(help="file for the results")] = None,
    *,
    engine: EngineConfig,
) -> None:
    """Time the load of an adapter, and what running requests feel of it."""
    from headrace.bench.adapter_load import run_adapter_load

    run_adapter_load(engine, rank, batch, csv)
