"""How long an adapter takes to load, and what the requests that run meanwhile feel of it.

A gap is the time between two steps' news: what a user who streams would see between two tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.bench.latency import device_name, random_prompts
from headrace.bench.results import write_csv
from headrace.bench.synth_adapter import write_adapter
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, LoadAdapter, SamplingParams, UnloadAdapter
from headrace.engine.phases import settle
from headrace.engine.threads import share_python
from headrace.models.config import read_config

PROMPT = 128  # tokens
QUIET_STEPS = 200  # before each load
NUM_RUNS = 3  # the first also takes memory that the others find


@dataclass(frozen=True)
class LoadRow:
    """One line of adapter_load.csv. Times in ms, if not in seconds."""

    rank: int
    adapter_bytes: int  # of its file
    batch: int  # requests of the base model that decode meanwhile
    run: int
    load_s: float  # until requests may name it
    quiet_gap_ms: float  # median before the load
    loading_gap_ms: float  # median during the load
    worst_gap_ms: float  # during the load, and until its CPU copy is made
    worst_to_quiet: float


def run_adapter_load(config: EngineConfig, rank: int, batch: int, csv: Path | None) -> None:
    """Measure, print the table and write the CSV."""
    with tempfile.TemporaryDirectory(prefix="headrace-adapter-") as folder:
        path = Path(folder) / "adapter"
        write_adapter(path, read_config(config.model), rank, seed=0)
        engine = Engine(
            replace(config, enable_lora=True, max_loras=1, max_lora_rank=rank, max_num_seqs=batch)
        )
        share_python()  # as the engine's own process does
        settle()
        rows = measure(engine, path, rank, batch)
    Console().print(load_table(rows, device_name(engine)))
    if csv:
        write_csv(csv, rows)


def measure(engine: Engine, path: Path, rank: int, batch: int) -> list[LoadRow]:
    """Load and unload an adapter beside requests that decode. ConfigError if it is refused."""
    num_bytes = (path / "adapter_model.safetensors").stat().st_size
    params = SamplingParams(max_tokens=engine.max_model_len - PROMPT, temperature=0.0)
    prompts = random_prompts(engine.model.config, batch, PROMPT)
    for i, prompt in enumerate(prompts):
        engine.add_request(AddRequest(str(i), prompt, params, time.monotonic()))
    rows = []
    for run in range(NUM_RUNS):
        quiet = gaps(engine, steps(QUIET_STEPS))[1:]  # the first holds the prefill
        start = time.perf_counter()
        engine.adapters.handle(LoadAdapter("loaded", str(path)))
        loading = gaps(engine, lambda: not answered(engine))
        seconds = time.perf_counter() - start
        keeping = gaps(engine, lambda: engine.adapters.is_loading)
        engine.adapters.handle(UnloadAdapter("loaded"))
        answered(engine)
        worst, median = 1000 * max(loading + keeping), 1000 * statistics.median(quiet)
        rows.append(
            LoadRow(
                rank=rank,
                adapter_bytes=num_bytes,
                batch=batch,
                run=run,
                load_s=round(seconds, 3),
                quiet_gap_ms=round(median, 3),
                loading_gap_ms=round(1000 * statistics.median(loading), 3),
                worst_gap_ms=round(worst, 3),
                worst_to_quiet=round(worst / median, 2),
            )
        )
    engine.abort(map(str, range(batch)))
    return rows


def gaps(engine: Engine, more: Callable[[], bool]) -> list[float]:
    """Seconds from each step's news to the next, while there is more; at least one step."""
    found = []
    last = time.perf_counter()
    while True:
        for output in engine.step():
            if output.finish_reason is not None:
                raise ConfigError(
                    "the requests ended before the load: give a longer --max-model-len"
                )
        now = time.perf_counter()
        found.append(now - last)
        last = now
        if not more():
            return found


def steps(count: int) -> Callable[[], bool]:
    """True count - 1 times."""
    left = iter(range(count - 1))
    return lambda: next(left, None) is not None


def answered(engine: Engine) -> bool:
    """Whether a load or unload has ended. ConfigError if it was refused."""
    replies = engine.adapters.take_replies()
    for reply in replies:
        if reply.error is not None:
            raise ConfigError(reply.error)
    return bool(replies)


def load_table(rows: list[LoadRow], device: str) -> Table:
    """One line a load."""
    first = rows[0]
    title = (
        f"{device}: an adapter of rank {first.rank}, {first.adapter_bytes / 1e9:.2f} GB, "
        f"beside {first.batch} requests"
    )
    table = Table("Load", "s", "gap before, ms", "during", "worst", "worst / before", title=title)
    for row in rows:
        gap = (row.quiet_gap_ms, row.loading_gap_ms, row.worst_gap_ms)
        times = [f"{ms:.2f}" for ms in gap]
        table.add_row(str(row.run), f"{row.load_s:.2f}", *times, f"{row.worst_to_quiet:.2f}")
    return table
