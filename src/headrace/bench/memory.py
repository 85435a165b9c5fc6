"""The most memory that the processes of a measurement held, seen from outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 0.2  # seconds between looks; a process's own peak is kept by the kernel
MIB = 2**20


@dataclass
class Peak:
    """Bytes; None where they can't be known: no /proc, or no NVIDIA GPU."""

    host: int | None = None  # sum of the processes' own peaks
    gpu: int | None = None  # on the fullest card, above what it held before
    _of_process: dict[int, int] = field(default_factory=dict)

    def look(self, gpu_before: int | None) -> None:
        """Take in what is held now."""
        for pid in descendants(os.getpid()):
            self._of_process[pid] = max(peak_resident(pid), self._of_process.get(pid, 0))
        self.host = sum(self._of_process.values()) or None
        if gpu_before is not None and (used := gpu_used()) is not None:
            self.gpu = max(self.gpu or 0, used - gpu_before)


@contextmanager
def watched_memory() -> Iterator[Peak]:
    """Watch this process's children, and theirs, and the GPU, until the block ends."""
    peak, gpu_before, done = Peak(), gpu_used(), threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak.look(gpu_before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def descendants(pid: int) -> list[int]:
    """Ids of the children of a process, and of theirs; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone by now
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, left = [], children.get(pid, [])
    while left:
        found += left
        left = [child for parent in left for child in children.get(parent, [])]
    return found


def peak_resident(pid: int) -> int:
    """Most bytes that a process has held, mapped files included; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def gpu_used() -> int | None:
    """Bytes in use on the fullest NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True)
    used = [int(line) for line in told.stdout.split() if line.isdigit()]
    return max(used) * MIB if used else None
