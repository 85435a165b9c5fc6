"""Time the dense layers with every tile worth a try: what ops/linear_tiles.py chooses from.

Beside them: cuBLAS, and the normalisation followed by the QKV projection, once with the projection
waiting for the end of the normalisation and once launched early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from headrace.bench.case import Case, time_us
from headrace.bench.cases_linear import (
    EPS,
    LAYERS,
    Calls,
    Layer,
    linear_case,
    random_calls,
    random_weights,
)
from headrace.bench.results import write_csv
from headrace.config import ConfigError
from headrace.ops import linear_kernel
from headrace.ops.linear_tiles import LinearProblem, LinearTile, choose, tma_fits
from headrace.ops.norm import rms_norm

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)


@dataclass(frozen=True)
class LinearTuneRow:
    """One way to compute one layer, a line of tune_linear.csv; cuBLAS has no tile."""

    layer: str
    m: int  # tokens
    what: str  # linear, cublas, or norm+linear
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
    early: bool | None = None


def run_tune_linear(console: Console, sizes: Sequence[int], out: Path) -> None:
    """Write tune_linear.csv to `out` and print the fastest way at each size.

    Raises ConfigError where there is no GPU, AssertionError for a tile with a wrong result.
    """
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA GPU here; tiles can only be timed on one")
    torch.manual_seed(0)
    _compile(sizes)
    rows: list[LinearTuneRow] = []
    for row in tune(sizes, torch.device("cuda")):
        rows.append(row)
        write_csv(out / "tune_linear.csv", rows)
    for best in fastest(rows):
        console.print(best)


def tune(sizes: Sequence[int], device: torch.device) -> Iterator[LinearTuneRow]:
    """Rows for each layer and size."""
    for layer in LAYERS:
        weights = random_weights(layer, device)
        for num_tokens in sizes:
            if num_tokens > layer.most_tokens:
                continue
            calls = random_calls(layer, weights, num_tokens)
            problem = LinearProblem(num_tokens, layer.out_features, layer.in_features)
            for tile in candidates(problem):
                run = _with_tile(calls, tile)
                yield _timed(layer, calls, "linear", run, tile)
            yield _timed(layer, calls, "cublas", _with_cublas(calls))
            if layer.name == "qkv":
                for tile in (choose(problem), replace(choose(problem), early=True)):
                    yield _timed(layer, calls, "norm+linear", _after_norm(calls, tile), tile)


def candidates(problem: LinearProblem) -> list[LinearTile]:
    """Tiles worth a try, and first the one chosen without."""
    chosen = choose(problem)
    tiles = [chosen]
    if problem.num_tokens <= 128:
        m, rows = chosen.block_m, chosen.rows
        if rows < 64 and m <= 32:
            tiles += [LinearTile(m, 64, rows, 64, 4, s) for s in (8, 12)]
            tiles += [LinearTile(m, 64, rows, 128, 4, s) for s in (5, 8)]
            tiles += [LinearTile(m, 64, rows, 256, 4, 4), LinearTile(m, 64, rows // 2, 128, 4, 4)]
            tiles += [LinearTile(m, 64, 64, 128, 4, 8)]
        elif rows < 64:
            tiles += [LinearTile(m, 64, rows, 64, 4, 6), LinearTile(m, 64, 64, 64, 4, 6)]
            tiles += [LinearTile(m, 64, 64, 128, 4, 4), LinearTile(m // 2, 64, rows, 128, 4, 4)]
            tiles += [LinearTile(m, 128, 128, 64, 8, 4), LinearTile(64, 128, 2 * rows, 64, 8, 4)]
        elif m <= 32:
            tiles += [LinearTile(m, 64, 64, 128, 4, s) for s in (3, 4, 8)]
            tiles += [LinearTile(m, 64, 64, 256, 4, 3), LinearTile(m, 128, 128, 64, 4, 4)]
            tiles += [LinearTile(m, 128, 128, 128, 8, 3)]
        else:
            tiles += [LinearTile(m, 128, 128, 64, 8, 3), LinearTile(m, 64, 64, 64, 4, 4)]
            tiles += [LinearTile(m, 128, 128, 128, 8, 3), LinearTile(m, 256, 256, 64, 8, 4)]
    else:
        tiles += [LinearTile(128, 128, 128, 64, 8, s, 8) for s in (3, 4)]
        tiles += [LinearTile(128, 128, 128, 64, 4, 3, 8), LinearTile(256, 64, 64, 64, 4, 4, 8)]
        tiles += [LinearTile(256, 128, 128, 64, 8, s, 8) for s in (3, 4)]
        tiles += [LinearTile(128, 256, 256, 64, 8, 4, 8), LinearTile(256, 128, 128, 64, 8, 4, 16)]
    tiles += [replace(t, tma=True) for t in tiles if tma_fits(problem, t.rows, t.block_n)]
    tiles = [t for t in tiles if _shared_memory(t) <= problem.shared_memory - 1024]
    return list(dict.fromkeys(tiles))


def fastest(rows: Sequence[LinearTuneRow]) -> list[LinearTuneRow]:
    """The fastest row of each layer, size and way."""
    best: dict[tuple[str, int, str], LinearTuneRow] = {}
    for row in rows:
        key = (row.layer, row.m, row.what)
        if key not in best or row.us < best[key].us:
            best[key] = row
    return list(best.values())


def _timed(
    layer: Layer,
    calls: Calls,
    what: str,
    run: Callable[[int], Tensor],
    tile: LinearTile | None = None,
) -> LinearTuneRow:
    case: Case = replace(linear_case(layer, calls), run=run)
    if what == "linear":
        calls.out.fill_(float("nan"))
        calls.check_result(run(0))
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


def _after_norm(calls: Calls, tile: LinearTile) -> Callable[[int], Tensor]:
    normed = torch.empty_like(calls.inputs[0])
    norm_weight = torch.ones_like(normed[0])

    def run(i: int) -> Tensor:
        x, weight = calls.operands(i)
        rms_norm(x, norm_weight, EPS, normed)
        return linear_kernel.linear(
            normed, weight, calls.bias, calls.residual, calls.out, tile=tile
        )

    return run


def _shared_memory(tile: LinearTile) -> int:
    return (tile.block_m + tile.block_n) * tile.block_k * 2 * tile.num_stages + 1024


def _compile(sizes: Sequence[int]) -> None:
    """Fill the kernel cache on all cores: one kernel takes about a second."""
    jobs = {}
    for layer in LAYERS:
        for num_tokens in sizes:
            if num_tokens <= layer.most_tokens:
                problem = LinearProblem(num_tokens, layer.out_features, layer.in_features)
                jobs.update(dict.fromkeys((layer, tile) for tile in candidates(problem)))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_tile, *zip(*jobs, strict=True)))


def _compile_tile(layer: Layer, tile: LinearTile) -> None:
    device = torch.device("cuda")
    weights = [
        torch.ones(layer.out_features, layer.in_features, dtype=torch.bfloat16, device=device)
    ]
    _with_tile(random_calls(layer, weights, 1), tile)(0)
