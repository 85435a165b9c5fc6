"""How long an adapter takes to load, and what the requests that run meanwhile feel of it.

A gap is the time between two steps' news: what a user who streams would see between two tokens.
Gaps during which the whole machine was slow (`headrace.bench.witness`) are counted apart, and the
same is measured before each load, for about as long.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.bench.latency import device_name, random_prompts
from headrace.bench.results import write_csv
from headrace.bench.synth_adapter import write_adapter
from headrace.bench.witness import Interval, Witness, overlap
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, LoadAdapter, SamplingParams, UnloadAdapter
from headrace.engine.phases import settle
from headrace.engine.threads import share_python
from headrace.models.config import read_config

PROMPT = 128  # tokens
QUIET_STEPS = 400  # before each load; it and the copy that is kept take about as many
NUM_RUNS = 8  # the first also takes memory that the others find


@dataclass(frozen=True)
class Gaps:
    """The gaps of a time, in ms, those while the machine was slow apart; not if that is all."""

    usual: list[float]
    slow: list[float]

    @staticmethod
    def of(gaps: Sequence[Interval], slow_times: list[Interval]) -> Gaps:
        """From intervals of time.perf_counter()."""
        both: tuple[list[float], list[float]] = [], []
        before = gaps[0][0]
        for begin, end in gaps:
            # the gap before counts, too: then the step was launched whose news end this one
            both[overlap((before, end), slow_times)].append(1000 * (end - begin))
            before = begin
        return Gaps(*both) if both[False] else Gaps(both[True], [])


@dataclass(frozen=True)
class Load:
    """What was seen of one load."""

    seconds: float  # until requests may name the adapter
    quiet: Gaps  # before it
    loading_gap_ms: float  # median until then
    beside: Gaps  # until its CPU copy is made


@dataclass(frozen=True)
class LoadRow:
    """One line of adapter_load.csv. Times in ms, if not in seconds."""

    rank: int
    adapter_bytes: int  # of its file
    batch: int  # requests of the base model that decode meanwhile
    run: int
    load_s: float  # until requests may name it
    quiet_gap_ms: float  # median before the load
    quiet_worst_ms: float
    loading_gap_ms: float  # median during the load, of all gaps
    worst_gap_ms: float  # during the load, and until its CPU copy is made
    slow_gaps: int  # meanwhile, that are not in the worst: the machine was slow
    slow_worst_ms: float  # of them
    worst_to_quiet: float  # worst_gap_ms / quiet_gap_ms

    @staticmethod
    def of(rank: int, adapter_bytes: int, batch: int, run: int, load: Load) -> LoadRow:
        """The row of one load."""
        quiet_ms, worst_ms = statistics.median(load.quiet.usual), max(load.beside.usual)
        return LoadRow(
            rank=rank,
            adapter_bytes=adapter_bytes,
            batch=batch,
            run=run,
            load_s=round(load.seconds, 3),
            quiet_gap_ms=round(quiet_ms, 3),
            quiet_worst_ms=round(max(load.quiet.usual), 3),
            loading_gap_ms=round(load.loading_gap_ms, 3),
            worst_gap_ms=round(worst_ms, 3),
            slow_gaps=len(load.beside.slow),
            slow_worst_ms=round(max(load.beside.slow, default=0), 3),
            worst_to_quiet=round(worst_ms / quiet_ms, 2),
        )


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
    with Witness() as witness:
        times = [measure_load(engine, path, witness) for _ in range(NUM_RUNS)]
    engine.abort(map(str, range(batch)))
    return [LoadRow.of(rank, num_bytes, batch, run, load) for run, load in enumerate(times)]


def measure_load(engine: Engine, path: Path, witness: Witness) -> Load:
    """Steps without a load, then those beside one; the adapter is unloaded at the end."""
    witness.slow_times()
    steady = gaps(engine, steps(QUIET_STEPS))[2:]  # without the prefill, told a step later
    quiet = Gaps.of(steady, witness.slow_times())
    start = time.perf_counter()
    engine.adapters.handle(LoadAdapter("loaded", str(path)))
    loading = gaps(engine, lambda: not answered(engine))
    seconds = time.perf_counter() - start
    keeping = gaps(engine, lambda: engine.adapters.is_loading)
    beside = Gaps.of(loading + keeping, witness.slow_times())
    engine.adapters.handle(UnloadAdapter("loaded"))
    answered(engine)
    median = statistics.median(1000 * (end - begin) for begin, end in loading)
    return Load(seconds, quiet, median, beside)


def gaps(engine: Engine, more: Callable[[], bool]) -> list[Interval]:
    """From each step's news to the next, while there is more; at least one step."""
    found = []
    last = time.perf_counter()
    while True:
        for output in engine.step():
            if output.finish_reason is not None:
                raise ConfigError(
                    "the requests ended before the load: give a longer --max-model-len"
                )
        now = time.perf_counter()
        found.append((last, now))
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
    table = Table("Load", "s", title=title)
    for column in ("before, ms", "worst", "during, ms", "worst", "worst / before"):
        table.add_column(column, justify="right")
    table.add_column("while the machine was slow", justify="right")
    for row in rows:
        times = (row.quiet_gap_ms, row.quiet_worst_ms, row.loading_gap_ms, row.worst_gap_ms)
        slow = f"{row.slow_gaps} gaps, {row.slow_worst_ms:.1f} ms" if row.slow_gaps else ""
        cells = [f"{ms:.2f}" for ms in times]
        table.add_row(str(row.run), f"{row.load_s:.2f}", *cells, f"{row.worst_to_quiet:.2f}", slow)
    return table
