"""`headrace bench sweep`: one server, one to many users, base and adapters; CSV and HTML out."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.bench.floors import find_gpu
from headrace.bench.peers import peer_rows
from headrace.bench.plots import need_matplotlib
from headrace.bench.report import Report, SweepRow, write_report
from headrace.bench.results import write_csv
from headrace.bench.serve import measure, print_failures
from headrace.bench.serve_config import ServeBenchConfig
from headrace.bench.server_process import largest_rank, lora_flags, running_server
from headrace.config import ConfigError
from headrace.files import parse_module
from headrace.models.config import read_config

MIN_PROMPTS = 20
KEYS = ("users", "input_len", "output_len", "adapters")  # columns: one load


@dataclass(frozen=True)
class Load:
    """How many ask at once, and for how many tokens."""

    users: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Sweep:
    """What to measure, on which server."""

    model: Path
    users: tuple[int, ...]
    input_len: int
    output_len: int
    prompts_per_user: int
    lora_modules: tuple[str, ...]  # NAME=PATH; empty: the base only
    serve_args: str  # more flags of `headrace serve`
    start_timeout: float  # seconds

    def __post_init__(self) -> None:
        if not self.users or min(self.users) < 1:
            raise ConfigError("--users must be numbers of 1 or more, such as 1,2,4,8")
        largest_rank(self.lora_modules)  # refuses what is no adapter


def parse_users(text: str) -> tuple[int, ...]:
    """Read "1,2,4"; raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--users {text!r}: give numbers such as 1,2,4,8") from None


def run_sweep(sweep: Sweep, out: Path | None) -> int:
    """Write OUT/serve.csv and OUT/serve.html; returns 1 if requests failed.

    Rows of serve.csv that are of other loads stay. OUT is bench/results/GPU by default. Raises
    ConfigError for a server that doesn't start.
    """
    need_matplotlib()
    device = device_name()
    gpu = find_gpu(device)
    out = out or Path("bench/results") / (gpu.name if gpu else device).lower().replace(" ", "-")
    config = read_config(sweep.model)
    peer_loads = [
        Load(row["users"], row["input_len"], row["output_len"])
        for row in peer_rows("serve", config, gpu.name if gpu else None)
    ]
    rows: list[SweepRow] = []
    failed = 0
    for lora_modules in [(), sweep.lora_modules] if sweep.lora_modules else [()]:
        for row, num_failed in measure_server(sweep, lora_modules, peer_loads):
            failed += num_failed
            rows.append(row)
            print(row.line, flush=True)
            write_csv(out / "serve.csv", [row], KEYS)
    rank = largest_rank(sweep.lora_modules)
    write_report(out / "serve.html", Report(sweep.model.name, device, gpu, config, rank, rows))
    print(f"Written: {out / 'serve.csv'}, {out / 'serve.html'}")
    return 1 if failed else 0


def measure_server(
    sweep: Sweep, lora_modules: tuple[str, ...], peer_loads: list[Load]
) -> Iterator[tuple[SweepRow, int]]:
    """Start a server and yield a row, and how many requests failed, for each load."""
    loads = [Load(users, sweep.input_len, sweep.output_len) for users in sweep.users]
    loads += [] if lora_modules else [load for load in peer_loads if load not in loads]
    most = max(load.users for load in loads)
    flags = ["--no-enable-prefix-caching", "--max-num-seqs", str(most)]
    flags += lora_flags(lora_modules) + shlex.split(sweep.serve_args)
    with running_server(sweep.model, flags, sweep.start_timeout) as url:
        for seed, load in enumerate(loads):
            config = ServeBenchConfig(
                base_url=url,
                tokenizer=sweep.model,
                random_input_len=load.input_len,
                random_output_len=load.output_len,
                num_prompts=max(MIN_PROMPTS, sweep.prompts_per_user * load.users),
                max_concurrency=load.users,
                num_warmups=load.users,
                temperature=0.0,
                seed=seed,
                lora_modules=tuple(parse_module(module)[0] for module in lora_modules),
                lora_assignment="round-robin",
            )
            run = asyncio.run(measure(config))
            print_failures(run.outcomes)
            summary = run.summary
            yield (
                SweepRow(
                    **vars(load),
                    adapters=len(lora_modules),
                    output_tok_s=round(summary.output_throughput, 1),
                    mean_ttft_ms=round(summary.mean("ttft"), 2),
                    median_ttft_ms=round(summary.median("ttft"), 2),
                    mean_tpot_ms=round(summary.mean("tpot"), 3),
                ),
                summary.failed,
            )


def device_name() -> str:
    """Name the GPU without taking memory on it; "cpu" where there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "cpu"
    return listed.splitlines()[0].strip()
