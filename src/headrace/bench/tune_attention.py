"""Time attention with every tile and way to share out work that is worth a try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from headrace.bench.case import need_gpu, time_us
from headrace.bench.cases_attention import (
    WINDOW,
    Attention,
    Calls,
    attention_case,
    fill,
    problems,
    random_calls,
)
from headrace.bench.kernels import Failures
from headrace.bench.results import fastest, write_csv
from headrace.ops.attention_plan import AttentionPlan, AttentionTile, empty_plan

SIZES = (1, 4, 16, 64, 128, 512, 2048, 8192)
SPLIT_ABOVE = (0.5, 1.5, 6.0, 1e9)  # the last: nothing is split
TILES = (
    AttentionTile(),
    AttentionTile(num_stages=2),
    AttentionTile(num_stages=2, programs_per_sm=3),
    AttentionTile(rows=128, num_warps=8, programs_per_sm=1),
    # other bits: these would change the default for all
    AttentionTile(keys=64, programs_per_sm=3),
    AttentionTile(keys=64, programs_per_sm=4),
    AttentionTile(rows=128, keys=64, num_warps=8, programs_per_sm=1),
    AttentionTile(rows=128, keys=64, num_warps=8, programs_per_sm=2),
)
PROBLEM = ("step", "m", "context", "window")  # columns: one problem


@dataclass(frozen=True)
class AttentionTuneRow:
    """One way to compute one problem, a line of tune_attention.csv."""

    step: str
    m: int  # tokens
    context: int
    window: int
    us: float
    tb_per_s: float
    tflop_per_s: float
    split_above: float
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def run_tune_attention(console: Console, sizes: Sequence[int], out: Path) -> None:
    """Write tune_attention.csv to `out` and print the fastest way for each problem.

    A tile that does not compile or gives wrong results is named and left out. Raises ConfigError
    where there is no GPU.
    """
    need_gpu("tiles")
    torch.manual_seed(0)
    tiles = []
    for tile, error in zip(TILES, compile_tiles(), strict=True):
        if error:
            console.print(f"{tile}: {error}", style="red", markup=False)
        else:
            tiles.append(tile)
    rows: list[AttentionTuneRow] = []
    for row in tune(sizes, tiles, torch.device("cuda"), Failures(console)):
        rows.append(row)
        write_csv(out / "tune_attention.csv", rows)
    for best in fastest(rows, PROBLEM):
        console.print(best)


def tune(
    sizes: Sequence[int],
    tiles: Sequence[AttentionTile],
    device: torch.device,
    failures: Failures,
) -> Iterator[AttentionTuneRow]:
    """Rows for each problem: every tile, then the default one with every way to split."""
    for problem in problems(sizes):
        calls = random_calls(problem, device)
        plans = [with_tile(calls, tile) for tile in tiles]
        for split_above in SPLIT_ABOVE if problem.step == "decode" and not problem.window else ():
            shape = replace(calls.plan.shape, split_above=split_above)
            plans.append(empty_plan(shape, problem.window, device))
        for plan in plans:
            row = failures.attempt(f"{problem} {plan.shape}", partial(_timed, calls, plan))
            if row is not None:
                yield row


def with_tile(calls: Calls, tile: AttentionTile) -> AttentionPlan:
    """A plan for another tile, still empty."""
    shape = calls.plan.shape
    num_sms = shape.num_programs // shape.tile.programs_per_sm
    max_tiles = calls.problem.num_tokens  # enough for every tile
    shape = replace(
        shape,
        tile=tile,
        num_programs=num_sms * tile.programs_per_sm,
        max_items=max_tiles + shape.max_part_rows,
    )
    return empty_plan(shape, calls.problem.window, calls.out.device)


def _timed(calls: Calls, plan: AttentionPlan) -> AttentionTuneRow:
    problem, case = calls.problem, attention_case(calls)
    fill(plan, problem)
    us = time_us(replace(case, run=lambda i: calls.run_with(plan, i)))
    return AttentionTuneRow(
        problem.step,
        problem.num_tokens,
        problem.context,
        problem.window,
        round(us, 2),
        round(case.num_bytes / us / 1e6, 3),
        round(case.num_flops / us / 1e6, 1),
        plan.shape.split_above,
        **vars(plan.shape.tile),
    )


def compile_tiles() -> list[str]:
    """Fill the kernel cache on all cores, some seconds a tile; what is wrong with each, or ""."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(_error_of, TILES))


def _error_of(tile: AttentionTile) -> str:
    try:
        for window in (0, WINDOW):
            calls = random_calls(Attention("chunk", 2, 20, 400, window), torch.device("cuda"))
            plan = with_tile(calls, tile)
            fill(plan, calls.problem)
            calls.out.fill_(float("nan"))
            calls.check_result(calls.run_with(plan, 0))
    except Exception as error:  # whatever it is, the other tiles are still to be timed
        return f"{type(error).__name__}: {error}"
    return ""
