"""The threads of a load, which leave the cores and Python to the thread of the steps."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

NUM_HELPERS = 4


@functools.cache
def helpers() -> ThreadPoolExecutor:
    """A few threads for a load's work on the CPU.

    All begin here: a thread's stack is mapped under Python's lock, and waits for those that already
    map a file.
    """
    pool = ThreadPoolExecutor(NUM_HELPERS, "lora-helper", initializer=compute_alone)
    all_there = threading.Barrier(NUM_HELPERS)
    for future in [pool.submit(all_there.wait) for _ in range(NUM_HELPERS)]:
        future.result()
    return pool


def compute_alone() -> None:
    """Have this thread compute by itself: no team of OpenMP's, which would take every core.

    One of them is that of the thread that launches the steps.
    """
    torch.set_num_threads(1)
