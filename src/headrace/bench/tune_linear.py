"""Time the dense layers with every tile worth a try, and cuBLAS: what ops/linear_tiles.py knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from headrace.bench.case import Case, need_gpu, time_us
from headrace.bench.cases_linear import (
    LAYERS,
    Calls,
    Layer,
    linear_case,
    random_calls,
    random_weights,
)
from headrace.bench.kernels import Failures
from headrace.bench.results import fastest, write_csv
from headrace.ops import linear_kernel
from headrace.ops.linear_tiles import LinearProblem, LinearTile, choose, tma_fits

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
PROBLEM = ("layer", "m", "what")  # columns: a layer at one size, in one way


@dataclass(frozen=True)
class LinearTuneRow:
    """One way to compute one layer, a line of tune_linear.csv; cuBLAS has no tile."""

    layer: str
    m: int  # tokens
    what: str  # linear or cublas
    us: float
    tb_per_s: float
    tflop_per_s: float
    block_m: int | None = None
    block_n: int | None = None
    rows: int | None = None
    block_k: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    group_m: int | None = None
    tma: bool | None = None
    programs: int | None = None


def run_tune_linear(console: Console, sizes: Sequence[int], out: Path) -> None:
    """Write tune_linear.csv to `out` and print the fastest way at each size.

    A tile that does not compile or gives wrong results is named and left out. Raises ConfigError
    where there is no GPU.
    """
    need_gpu("tiles")
    torch.manual_seed(0)
    problems = [
        (layer, LinearProblem(num_tokens, layer.out_features, layer.in_features))
        for layer in LAYERS
        for num_tokens in sizes
        if num_tokens <= layer.most_tokens
    ]
    broken = compile_tiles({(layer, tile) for layer, p in problems for tile in candidates(p)})
    for (layer, tile), error in broken.items():
        console.print(f"{layer.name} {tile}: {error}", style="red", markup=False)
    rows: list[LinearTuneRow] = []
    for row in tune(problems, set(broken), torch.device("cuda"), Failures(console)):
        rows.append(row)
        write_csv(out / "tune_linear.csv", rows)
    for best in fastest(rows, PROBLEM):
        console.print(best)


def tune(
    problems: Sequence[tuple[Layer, LinearProblem]],
    broken: set[tuple[Layer, LinearTile]],
    device: torch.device,
    failures: Failures,
) -> Iterator[LinearTuneRow]:
    """Rows for each layer and size, without the broken tiles."""
    for layer, group in groupby(problems, key=lambda pair: pair[0]):
        weights = random_weights(layer, device)
        for _, problem in group:
            calls = random_calls(layer, weights, problem.num_tokens)
            for tile in candidates(problem):
                if (layer, tile) in broken:
                    continue
                work = partial(_timed, layer, calls, "linear", _with_tile(calls, tile), tile)
                row = failures.attempt(f"{layer.name} m={problem.num_tokens} {tile}", work)
                if row is not None:
                    yield row
            yield _timed(layer, calls, "cublas", _with_cublas(calls))


def candidates(problem: LinearProblem) -> list[LinearTile]:
    """Tiles worth a try, and first the one chosen without."""
    m = max(16, 1 << (problem.num_tokens - 1).bit_length())
    rows = -(-problem.out_features // (8 * problem.num_sms)) * 8  # of an SM, if all have as many
    many_rows = problem.num_tokens > 128 or rows > 64
    if problem.num_tokens > 128:
        tiles = _for_many_tokens()
    elif many_rows:
        tiles = _for_many_rows(m)
    else:
        tiles = _for_few_tokens(m, rows)
    by_tma = [replace(t, tma=True) for t in tiles if tma_fits(problem, t.rows, t.block_n)]
    if many_rows:
        by_tma += [
            replace(t, programs=n * problem.num_sms)
            for t in by_tma
            for n in (1, 2)
            if n * _shared_memory(t) <= problem.shared_memory
        ]
    fitting = [t for t in tiles + by_tma if _shared_memory(t) <= problem.shared_memory - 1024]
    return list(dict.fromkeys([choose(problem), *fitting]))


def _for_few_tokens(m: int, rows: int) -> list[LinearTile]:
    if m <= 32:
        return [
            *(LinearTile(m, 64, rows, 64, 4, s) for s in (8, 12)),
            *(LinearTile(m, 64, rows, 128, 4, s) for s in (5, 8)),
            LinearTile(m, 64, rows, 256, 4, 4),
            LinearTile(m, 64, rows // 2, 128, 4, 4),
            LinearTile(m, 64, 64, 128, 4, 8),
        ]
    return [
        LinearTile(m, 64, rows, 64, 4, 6),
        LinearTile(m, 64, rows, 128, 4, 4),
        LinearTile(m // 2, 64, rows, 128, 4, 4),
        LinearTile(m, 64, 64, 64, 4, 6),
        LinearTile(m, 64, 64, 128, 4, 4),
        *(LinearTile(64, 128, 2 * rows, 64, 8, s) for s in (4, 8)),
    ]


def _for_many_rows(m: int) -> list[LinearTile]:
    if m <= 32:
        return [
            *(LinearTile(m, 64, 64, 128, 4, s) for s in (4, 8)),
            LinearTile(m, 64, 64, 256, 4, 3),
            LinearTile(m, 128, 128, 64, 4, 4),
            LinearTile(m, 128, 128, 128, 8, 5),
        ]
    return [
        LinearTile(m, 64, 64, 64, 4, 4),
        *(LinearTile(m, 128, 128, 64, 8, s) for s in (3, 6)),
        LinearTile(m, 256, 256, 64, 8, 4),
    ]


def _for_many_tokens() -> list[LinearTile]:
    return [
        LinearTile(128, 64, 64, 64, 4, 4, 8),
        LinearTile(128, 128, 128, 64, 4, 3, 8),
        *(LinearTile(128, 128, 128, 64, 8, s, 8) for s in (3, 5)),
        *(LinearTile(256, 128, 128, 64, 8, s, 8) for s in (3, 4)),
        LinearTile(256, 128, 128, 64, 8, 4, 16),
        LinearTile(128, 256, 256, 64, 8, 4, 8),
    ]


def _timed(
    layer: Layer,
    calls: Calls,
    what: str,
    run: Callable[[int], Tensor],
    tile: LinearTile | None = None,
) -> LinearTuneRow:
    case: Case = replace(linear_case(layer, calls), run=run)
    us = time_us(case)
    rates = (round(case.num_bytes / us / 1e6, 3), round(case.num_flops / us / 1e6, 1))
    return LinearTuneRow(
        layer.name, case.num_tokens, what, round(us, 2), *rates, **vars(tile) if tile else {}
    )


def _with_tile(calls: Calls, tile: LinearTile) -> Callable[[int], Tensor]:
    def run(i: int) -> Tensor:
        x, weight = calls.operands(i)
        return linear_kernel.linear(x, weight, calls.bias, calls.residual, calls.out, tile=tile)

    return run


def _with_cublas(calls: Calls) -> Callable[[int], Tensor]:
    """Without the residual, and rounded to bfloat16: the least that it can be asked for."""

    def run(i: int) -> Tensor:
        x, weight = calls.operands(i)
        return F.linear(x, weight, calls.bias)

    return run


def _shared_memory(tile: LinearTile) -> int:
    stages = (tile.block_m + tile.block_n) * tile.block_k * 2 * tile.num_stages
    return stages + (tile.block_m * tile.block_n if tile.programs else 0)


def compile_tiles(
    jobs: set[tuple[Layer, LinearTile]],
) -> dict[tuple[Layer, LinearTile], str]:
    """Fill the kernel cache on all cores, a second or so a tile; the broken ones and why."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        errors = dict(zip(jobs, pool.map(error_of, *zip(*jobs, strict=True)), strict=True))
    return {job: error for job, error in errors.items() if error}


def error_of(layer: Layer, tile: LinearTile) -> str:
    """What is wrong with a tile, or ""; one that breaks the device breaks those after it, too."""
    part = replace(layer, out_features=8 * tile.rows)  # the same kernel, and little memory
    try:
        calls = random_calls(part, random_weights(part, torch.device("cuda")), tile.block_m + 1)
        calls.out.fill_(float("nan"))
        calls.check_result(_with_tile(calls, tile)(0))
    except Exception as error:  # whatever it is, the other tiles are still to be timed
        return f"{type(error).__name__}: {error}"
    return ""
