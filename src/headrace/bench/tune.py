"""Time both expert matmuls with every tile worth a try: what ops/tiles.py chooses from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from headrace.bench.case import NUM_INPUTS, NUM_WEIGHT_SETS, Case, need_gpu, time_us
from headrace.bench.cases_moe import NUM_EXPERTS, TOP_K, make_step, random_layer
from headrace.bench.kernels import Failures
from headrace.bench.results import fastest, write_csv
from headrace.ops.moe import MoEWeights
from headrace.ops.moe_kernel import down_matmul, gate_up_matmul
from headrace.ops.tiles import MoETiles, Tile

MATMULS = {"gate_up": gate_up_matmul, "down": down_matmul}
PROBLEM = ("experts", "m", "op")  # columns: a matmul at one size


@dataclass(frozen=True)
class TuneRow:
    """One tile of one matmul, a line of tune.csv."""

    experts: int
    m: int
    op: str
    us: float
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int
    narrow: str  # widths


def run_tune(console: Console, sizes: Sequence[int], out: Path) -> None:
    """Write tune.csv to `out` and print the fastest tile of each matmul.

    Raises ConfigError where there is no GPU.
    """
    need_gpu("tiles")
    torch.manual_seed(0)
    _compile({tile for e in NUM_EXPERTS for m in sizes for tile in candidates(m, e)})
    rows: list[TuneRow] = []
    for row in tune(sizes, torch.device("cuda"), Failures(console)):
        rows.append(row)
        write_csv(out / "tune.csv", rows)
    for best in fastest(rows, PROBLEM):
        console.print(best)


def tune(sizes: Sequence[int], device: torch.device, failures: Failures) -> Iterator[TuneRow]:
    """A row for each number of experts, size, tile and matmul, but for tiles that do not run."""
    for num_experts in NUM_EXPERTS:
        layers = [random_layer(num_experts, device) for _ in range(NUM_WEIGHT_SETS)]
        for m in sizes:
            expected: list[Tensor] = []  # the first tile's result: all must give its bits
            for tile in candidates(m, num_experts):
                work = partial(time_tile, layers, m, tile, expected)
                times = failures.attempt(f"experts={num_experts} m={m} {tile}", work) or {}
                sizes_of = vars(tile) | {"narrow": " ".join(map(str, tile.narrow))}
                for op, us in times.items():
                    yield TuneRow(num_experts, m, op, round(us, 1), **sizes_of)


def time_tile(
    layers: Sequence[MoEWeights], num_tokens: int, tile: Tile, expected: list[Tensor]
) -> dict[str, float]:
    """Microseconds of each matmul; AssertionError unless the layer's result is the expected."""
    torch.manual_seed(num_tokens)  # the same inputs for every tile
    step = make_step(layers, num_tokens, MoETiles(tile, tile))
    for i in range(NUM_INPUTS):
        step.layer(i)  # routes and fills what the second matmul reads
    expected += [] if expected else [step.outs[0]]
    assert torch.equal(step.outs[0], expected[0]), "other bits than the first tile's"

    def case(op: str) -> Case:
        def run(i: int) -> object:
            return MATMULS[op](layers[i % NUM_WEIGHT_SETS], step.buffers[i % NUM_INPUTS])

        return Case(op, {}, num_tokens, run, step.check_layer, 0.0, 0.0)

    return {op: time_us(case(op)) for op in MATMULS}


def candidates(num_tokens: int, num_experts: int) -> list[Tile]:
    """Tiles worth a try, by the rows of an expert if they spread evenly."""
    rows = num_tokens * TOP_K / num_experts
    tiles = []
    if rows <= 16:
        tiles += [Tile(16, 64, 128, 4, s) for s in (3, 4, 5, 7)]
        tiles += [Tile(16, 64, 256, 4, s) for s in (3, 4)]
        tiles += [Tile(16, 128, 128, 4, s) for s in (3, 4, 5, 6)]
        tiles += [Tile(16, 128, 128, 8, 5), Tile(16, 128, 256, 8, 4)]
    if 4 <= rows <= 32:
        tiles += [Tile(32, 64, 128, 4, 3), Tile(32, 64, 128, 4, 5), Tile(32, 128, 128, 8, 4)]
        tiles += [Tile(32, 128, 128, 4, s) for s in (3, 4)]
    if 8 <= rows <= 64:
        tiles += [Tile(64, 64, 128, 4, 3), Tile(64, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3)]
        tiles += [Tile(64, 64, 128, 4, 4, 2), Tile(64, 256, 128, 8, 3)]
        tiles += [Tile(64, 128, 128, 4, 3, 1, narrow) for narrow in ((16,), (32,), (16, 32))]
    if rows >= 32:
        tiles += [Tile(128, 128, 128, 8, 3, 4), Tile(128, 128, 128, 8, 4, 8)]
        tiles += [Tile(128, 64, 128, 4, 3, 4), Tile(128, 128, 128, 4, 3, 4)]
        narrows = ((32,), (64,), (32, 64))
        tiles += [
            Tile(128, 128, 128, 4, 3, group, narrow) for group in (1, 4) for narrow in narrows
        ]
    if rows >= 64:  # the more rows of the weight, the less often x is read
        tiles += [Tile(128, 256, 128, 8, 3, 4), Tile(128, 256, 128, 8, 2, 4)]
        tiles += [Tile(128, 256, 128, 8, 3, 8), Tile(64, 256, 128, 8, 3, 4)]
    if rows >= 128:
        tiles += [Tile(256, 128, 128, 8, 3, 4), Tile(256, 128, 128, 8, 2, 4)]
        tiles += [Tile(256, 128, 128, 8, 3, 4, (64, 128))]
        tiles += [Tile(128, 128, 128, 4, 3, 8), Tile(128, 128, 128, 4, 2, 4)]
    return tiles


def _compile(tiles: set[Tile]) -> None:
    """Fill the kernel cache on all cores: one kernel takes about a second."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_tile, tiles))


def _compile_tile(tile: Tile) -> None:
    with suppress(Exception):  # told when it is timed
        layer = random_layer(4, torch.device("cuda"))
        make_step([layer] * NUM_WEIGHT_SETS, 1, MoETiles(tile, tile)).layer(0)
