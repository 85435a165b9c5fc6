"""Time one expert layer under the ways its launches may overlap: for `MoETiles` at few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from headrace.bench.case import NUM_WEIGHT_SETS, Case, need_gpu, time_us
from headrace.bench.cases_moe import HIDDEN, TOP_K, make_step, random_layer
from headrace.bench.kernels import Failures
from headrace.bench.results import write_csv
from headrace.ops.moe import MoEWeights
from headrace.ops.tiles import MoETiles, Problem, choose

NUM_EXPERTS = 32
SIZES = (1, 2, 4, 8, 16)
TILE_BYTES = -(-HIDDEN // 128) * 4096  # of the weights of 64 rows


@dataclass(frozen=True)
class LaunchRow:
    """One way at one size, a line of tune_launches.csv."""

    m: int
    us: float
    early_gate_up: bool
    early_down: bool
    prefetch_bytes: int
    ahead_bytes: int


def run_tune_launches(console: Console, sizes: Sequence[int], out: Path) -> None:
    """Write tune_launches.csv to `out` and print the fastest way for each size, and the plain one.

    A way that does not run or gives wrong results is named and left out. Raises ConfigError where
    there is no GPU.
    """
    need_gpu("launches")
    torch.manual_seed(0)
    layers = [random_layer(NUM_EXPERTS, torch.device("cuda")) for _ in range(NUM_WEIGHT_SETS)]
    rows: list[LaunchRow] = []
    failures = Failures(console)
    for m in sizes:
        of_size = []
        for row in tune_size(layers, m, failures):
            of_size.append(row)
            write_csv(out / "tune_launches.csv", rows + of_size)
        rows += of_size
        if of_size:
            console.print(of_size[0])
            console.print(min(of_size, key=lambda row: row.us))


def tune_size(
    layers: Sequence[MoEWeights], num_tokens: int, failures: Failures
) -> Iterator[LaunchRow]:
    """A row for each way; all of them must give the bits of the first."""
    expected: list[Tensor] = []
    for tiles in ways(choose(Problem(num_tokens * TOP_K, NUM_EXPERTS))):
        work = partial(time_way, layers, num_tokens, tiles, expected)
        row = failures.attempt(f"m={num_tokens} {tiles}", work)
        if row is not None:
            yield row


def time_way(
    layers: Sequence[MoEWeights], num_tokens: int, tiles: MoETiles, expected: list[Tensor]
) -> LaunchRow:
    """One way; AssertionError unless its result is the expected."""
    torch.manual_seed(num_tokens)  # the same inputs each time
    step = make_step(layers, num_tokens, tiles)
    got = step.layer(0).clone()
    expected += [] if expected else [got]
    assert torch.equal(got, expected[0]), "other bits than the first way's"
    us = time_us(Case("moe_layer", {}, num_tokens, step.layer, step.check_layer, 0.0, 0.0))
    early = tiles.gate_up.early, tiles.down.early
    ahead = tiles.gate_up.prefetch_bytes, tiles.ahead_bytes
    return LaunchRow(num_tokens, round(us, 1), *early, *ahead)


def ways(tiles: MoETiles) -> Iterator[MoETiles]:
    """The plain launches first, then every mixture."""
    early = ((False, False), (False, True), (True, True))
    own, ahead = (0, TILE_BYTES), (0, 32768, TILE_BYTES)
    for (gate_up, down), prefetch, ahead_bytes in product(early, own, ahead):
        yield MoETiles(
            replace(tiles.gate_up, early=gate_up, prefetch_bytes=prefetch),
            replace(tiles.down, early=down, prefetch_bytes=prefetch),
            ahead_bytes,
        )
