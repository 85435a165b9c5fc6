"""From the start of `headrace serve` to its first answer, with and without its caches.

Cold: no compiled kernels, and no page of the checkpoint in the system's cache. Warm: both are left
from a start before.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.bench.memory import Peak, watched_memory
from headrace.bench.results import write_csv
from headrace.bench.server_process import running_server

START_TIMEOUT = 900.0  # seconds
ANSWER_TIMEOUT = 300.0
GIB = 2**30
PHASE = re.compile(r'headrace:startup_seconds\{.*?phase="([^"]+)".*?\} (\S+)')


@dataclass(frozen=True)
class StartupRow:
    """One line of startup.csv: a part of the start, or its whole with the memory it took."""

    cache: str  # cold or warm
    phase: str
    seconds: float
    host_gib: float | None = None  # peak resident memory of all processes
    gpu_gib: float | None = None


def run_startup(model: Path, flags: Sequence[str], csv: Path | None) -> None:
    """Start a server twice, cold and then warm; print the table and write the CSV."""
    rows: list[StartupRow] = []
    with tempfile.TemporaryDirectory() as kernels, kernel_cache(Path(kernels)):
        drop_page_cache(model)
        for cache in ("cold", "warm"):
            rows += measure_start(model, flags, cache)
            if csv:
                write_csv(csv, rows)
    Console().print(startup_table(rows, str(model)))


def measure_start(model: Path, flags: Sequence[str], cache: str) -> list[StartupRow]:
    """The phases that the server tells of, then seconds until it listens and until it answers.

    Raises ConfigError with the end of the server's log if it doesn't start.
    """
    with watched_memory() as peak:
        start = time.perf_counter()
        with running_server(model, flags, START_TIMEOUT) as url:
            ready = time.perf_counter() - start
            ask(url)
            answered = time.perf_counter() - start
            phases = read_phases(fetch(f"{url}/metrics"))
    rows = [StartupRow(cache, phase, round(s, 2)) for phase, s in phases.items()]
    rows.append(StartupRow(cache, "until it listens", round(ready, 2)))
    host, gpu = in_gib(peak)
    return [*rows, StartupRow(cache, "until the first answer", round(answered, 2), host, gpu)]


@contextmanager
def kernel_cache(folder: Path) -> Iterator[None]:
    """Child processes keep their compiled kernels there."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before


def drop_page_cache(model: Path) -> None:
    """Ask the system to forget the checkpoint's pages; those that others map stay."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # pages still to be written can't be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ask(url: str) -> None:
    """One token for one token."""
    model = json.loads(fetch(f"{url}/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": [1], "max_tokens": 1}
    fetch(f"{url}/v1/completions", json.dumps(body).encode())


def fetch(url: str, body: bytes | None = None) -> str:
    """The text of an answer; raises OSError for a status that is not 2xx."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT) as response:
        text: str = response.read().decode()
    return text


def read_phases(metrics: str) -> dict[str, float]:
    """Seconds by phase, from the text of /metrics."""
    return {phase: float(seconds) for phase, seconds in PHASE.findall(metrics)}


def in_gib(peak: Peak) -> tuple[float | None, float | None]:
    """Host and GPU, rounded."""
    host, gpu = (None if b is None else round(b / GIB, 2) for b in (peak.host, peak.gpu))
    return host, gpu


def startup_table(rows: Sequence[StartupRow], title: str) -> Table:
    """Seconds of each phase, cold beside warm, and the peaks of memory."""
    table = Table("phase", title=title)
    found = {(row.cache, row.phase): row for row in rows}
    for cache in ("cold", "warm"):
        table.add_column(f"{cache} s", justify="right")
    for phase in dict.fromkeys(row.phase for row in rows):
        both = [found.get((cache, phase)) for cache in ("cold", "warm")]
        table.add_row(phase, *("" if row is None else f"{row.seconds:.2f}" for row in both))
    table.add_section()
    last = [next(r for r in reversed(rows) if r.cache == cache) for cache in ("cold", "warm")]
    for name, values in (
        ("peak host GiB", [row.host_gib for row in last]),
        ("peak GPU GiB", [row.gpu_gib for row in last]),
    ):
        table.add_row(name, *("" if value is None else f"{value:.2f}" for value in values))
    return table
