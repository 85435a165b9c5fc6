"""How long each part of a start took, and what the memory became."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec


class StartReport(msgspec.Struct, frozen=True):
    """What the engine tells of its start."""

    phases: dict[str, float]  # seconds by phase, in their order
    weight_bytes: int = 0  # that the weights take on the device
    cache_bytes: int = 0  # all pages of all groups
    cache_tokens: int = 0  # that fit into the pages of full attention
    num_kernels: int = 0
    num_compiled: int = 0  # kernels that were not found on disk
    adapter_bytes: int = 0  # set aside for adapters on the device


class Phases:
    """A stopwatch: `with phases("weights"): ...` adds to the phase of that name.

    The first phase, imports, runs from the start of the process until this object is made.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        if (age := process_age()) is not None:
            self.seconds["imports"] = age

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block, also of one that ends with an exception."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def process_age() -> float | None:
    """Seconds since this process was started; None where there is no /proc."""
    try:
        # fields 3 and later follow the name, which is in parentheses and may hold anything
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22: start, in clock ticks


def settle() -> None:
    """End the start of a process that serves: what it has made by now is collected no more.

    A full collection that goes through all of it stops every thread for 0.1 s or more.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
