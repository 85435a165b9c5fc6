from __future__ import annotations

import pytest

pytest.importorskip("triton")

from headrace.bench.cases_moe import NUM_EXPERTS, TOP_K
from headrace.bench.kernels import SIZES
from headrace.bench.results import fastest
from headrace.bench.tune import PROBLEM, TuneRow, candidates
from headrace.ops.tiles import Problem, choose


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
@pytest.mark.parametrize("m", SIZES)
def test_the_choice_is_among_the_candidates(m: int, num_experts: int) -> None:
    """Up to the stages and the grouping: what is in the table was measured."""
    chosen = choose(Problem(m * TOP_K, num_experts))
    tried = {(t.block_m, t.block_n, t.num_warps) for t in candidates(m, num_experts)}
    for tile in (chosen.gate_up, chosen.down):
        assert (tile.block_m, tile.block_n, tile.num_warps) in tried


def test_fastest() -> None:
    timed = [(1, "down", 9.0, 3), (1, "down", 8.0, 5), (1, "gate_up", 7.0, 3)]
    rows = [TuneRow(32, m, op, us, 16, 64, 128, 4, stages, 1, "") for m, op, us, stages in timed]
    assert fastest(rows, PROBLEM) == rows[1:]
