from __future__ import annotations

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")

from headrace.bench.cases_attention import Attention, fill, random_calls
from headrace.bench.kernels import Failures
from headrace.bench.results import fastest
from headrace.bench.tune_attention import PROBLEM, TILES, AttentionTuneRow, tune, with_tile
from headrace.ops.attention_plan import CUTS, SPLITS, AttentionTile


def test_tiles() -> None:
    assert TILES[0] == AttentionTile()
    assert len(set(TILES)) == len(TILES)
    for tile in TILES:
        assert tile.programs_per_sm * tile.num_warps <= 16
        assert all(keys % tile.keys == 0 for keys in SPLITS + CUTS)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("num_seqs", [1, 30])
def test_every_tile_has_room_for_its_plan(tile: AttentionTile, num_seqs: int) -> None:
    calls = random_calls(Attention("chunk", num_seqs, 9, 300, 0), torch.device("cpu"))
    plan = with_tile(calls, tile)
    fill(plan, calls.problem)
    assert plan.shape.num_programs == tile.programs_per_sm
    assert plan.words[0] >= num_seqs


def test_fastest() -> None:
    timed = [("decode", 1, 9.0, 3), ("decode", 1, 8.0, 4), ("chunk", 1, 7.0, 3)]
    rows = [
        AttentionTuneRow(step, m, 600, 0, us, 1.0, 1.0, 2.0, 64, 128, 4, stages, 2)
        for step, m, us, stages in timed
    ]
    assert fastest(rows, PROBLEM) == rows[1:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it can be timed")
def test_what_cannot_be_timed_is_left_out() -> None:
    failures = Failures(Console(record=True, width=200))
    assert list(tune([512], TILES[:1], torch.device("cpu"), failures)) == []
    assert failures.count == 2  # with a window and without
