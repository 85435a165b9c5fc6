"""One thing that `headrace bench kernels` times, and how it is timed.

A module of this package named cases_* is found by its name. It names its ops in `OPS`; its function
`cases(sizes, device)` yields one `Case` after the other, so that only one is in memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from headrace.bench.floors import Work
from headrace.config import ConfigError

NUM_INPUTS = 8  # call i reads inputs[i % NUM_INPUTS] ...
NUM_WEIGHT_SETS = 3  # ... and weights[i % NUM_WEIGHT_SETS]: their data is not in L2 from last time
NUM_REPLAYS = 15


def need_gpu(what: str) -> None:
    """Raise ConfigError where there is no GPU to time something on."""
    if not torch.cuda.is_available():
        raise ConfigError(f"no CUDA GPU here; {what} can only be timed on one")


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str  # as in `ops/`, such as "linear": one CSV file and one plot an op
    labels: Mapping[str, int | str]  # what tells its curves apart, such as {"experts": 32}
    num_tokens: int  # the plot's axis
    run: Callable[[int], object]  # call number i; allocates nothing, and does not wait for the GPU
    check: Callable[[], None]  # run(0), and an AssertionError if its result is wrong
    num_bytes: float  # that one call must read and write at least
    num_flops: float  # 2 a multiply-add
    num_calls: int = 24  # timed together; more for what takes a few us
    in_graph: bool = True  # else call by call: for what allocates or waits, at load

    @property
    def work(self) -> Work:
        """What the floor is made of."""
        return Work(self.num_bytes, self.num_flops)

    @property
    def name(self) -> str:
        """The op and its labels, such as "moe_layer experts=32"."""
        return " ".join([self.op, *(f"{k}={v}" for k, v in self.labels.items())])


class CaseModule(Protocol):
    """What a module of cases must have."""

    OPS: Sequence[str]

    def cases(self, sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
        """The cases at these numbers of tokens; sizes the op has no use for are left out."""


def time_us(case: Case) -> float:
    """Microseconds of a call: median of 15 replays of a CUDA graph of case.num_calls calls."""

    def calls() -> None:
        for i in range(case.num_calls):
            case.run(i)

    calls()  # compiles, and fills what is made on first use
    torch.cuda.synchronize()
    if not case.in_graph:
        return _median_us(calls) / case.num_calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return _median_us(graph.replay) / case.num_calls


def _median_us(work: Callable[[], None]) -> float:
    times = []
    for _ in range(NUM_REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[2:])
