"""How the threads of a process share the cores and Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

SMALL_CHECKPOINT = 256 * 2**20  # bytes; a matmul of such a model ends sooner than threads can meet
SWITCH_INTERVAL = 1e-4  # seconds; Python's default is 5 ms


def set_cpu_threads(checkpoint: Path) -> None:
    """One thread for a small checkpoint, torch's own choice (a core each) for a large one.

    Threads of a small model mostly wait for each other: beside another busy process, two made the
    bundled model about 60 times slower than one. OMP_NUM_THREADS, where set, decides instead.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    if size <= SMALL_CHECKPOINT:
        torch.set_num_threads(1)


def share_python() -> None:
    """Let a thread that wants Python wait for 0.1 ms at most, in this process.

    A step of 2 ms or more takes Python several times, and a thread that loads an adapter would give
    it back only after 5 ms each time.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
