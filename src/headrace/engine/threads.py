"""How many threads the CPU backend computes with."""

from __future__ import annotations

import os
from pathlib import Path

import torch

SMALL_CHECKPOINT = 256 * 2**20  # bytes; a matmul of such a model ends sooner than threads can meet


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
