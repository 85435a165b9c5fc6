from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from headrace.bench.cases_linear import LAYERS
from headrace.bench.results import fastest
from headrace.bench.tune_linear import PROBLEM, SIZES, LinearTuneRow, candidates, error_of
from headrace.ops.linear_tiles import LinearProblem, choose


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("num_tokens", SIZES)
def test_candidates(layer, num_tokens):
    problem = LinearProblem(num_tokens, layer.out_features, layer.in_features)
    tiles = candidates(problem)
    assert tiles[0] == choose(problem)
    assert len(set(tiles)) == len(tiles) > 5
    assert {tile.tma for tile in tiles} == {False, True}


def test_fastest():
    timed = [("qkv", 1, 9.0, 3), ("qkv", 1, 8.0, 5), ("output", 1, 7.0, 3), ("qkv", 2, 9.5, 3)]
    rows = [
        LinearTuneRow(layer, m, "linear", us, 1.0, 1.0, num_stages=stages)
        for layer, m, us, stages in timed
    ]
    assert fastest(rows, PROBLEM) == rows[1:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the device is no error")
def test_an_error_of_the_device_is_told_as_a_tiles_own():
    told = error_of(LAYERS[0], choose(LinearProblem(1, 5120, 2880)))
    assert "CUDA" in told or "NVIDIA" in told
