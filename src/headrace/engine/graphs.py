"""Captured CUDA graphs: the launches of a step as one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def graph_sizes(max_rows: int) -> list[int]:
    """1 to 7, then four sizes to every doubling; the last is max_rows itself.

    A step in between is padded by at most a quarter.
    """
    sizes, step = list(range(1, 8)), 1
    while sizes[-1] < max_rows:
        sizes += range(8 * step, 16 * step, 2 * step)
        step *= 2
    return sorted({size for size in sizes if size < max_rows} | {max_rows})


def chunk_sizes(max_tokens: int, has_lora: bool) -> list[int]:
    """Numbers of tokens of the steps with chunks of prompts that are worth a graph.

    Larger ones keep the GPU busy for longer than the host takes to launch them one by one, and
    padding would cost more: 2048 tokens of gpt-oss-20b take an H100 32 ms, 197 launches take its
    host 18; with adapters 44 and 60 ms.
    """
    most = min(max_tokens, 2048 if has_lora else 1024)
    return [size for size in graph_sizes(most) if size >= min(max_tokens, 16)]


class Graphs:
    """One graph for each number of rows, all in one memory pool."""

    def __init__(self) -> None:
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._sizes: Sequence[int] = ()
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, num_rows: int) -> int | None:
        """The smallest captured size that holds so many rows."""
        i = bisect_left(self._sizes, num_rows)
        return self._sizes[i] if i < len(self._sizes) else None

    def capture(self, size: int, forward: Callable[[], Tensor]) -> None:
        """Record what `forward` launches; its inputs must keep their addresses.

        A capture may compile and load no kernel: a dry run has done so.
        """
        if not self._captured:
            forward()  # what else is made at a first use; before each it doubled the time
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread, which reads adapters, may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = forward()
        self._captured[size] = graph, out
        self._sizes = sorted(self._captured)

    def replay(self, size: int) -> Tensor:
        """Launch a graph; returns its output, which the next replay overwrites."""
        graph, out = self._captured[size]
        graph.replay()
        return out
