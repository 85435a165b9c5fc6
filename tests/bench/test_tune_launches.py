from __future__ import annotations

import pytest
from rich.console import Console

pytest.importorskip("triton")

from headrace.bench.kernels import Failures
from headrace.bench.tune_launches import tune_size, ways
from headrace.ops.tiles import Problem, choose


def test_the_plain_launches_come_first_and_every_way_once() -> None:
    chosen = choose(Problem(4, 32))
    found = list(ways(chosen))
    assert not found[0].gate_up.early
    assert found[0].ahead_bytes == 0
    assert len(set(found)) == len(found) == 18
    assert chosen in found
    assert all(tiles.ahead_bytes % 4096 == 0 for tiles in found)


def test_a_way_that_does_not_run_is_left_out() -> None:
    failures = Failures(Console(record=True, width=200))
    assert list(tune_size([], 1, failures)) == []
    assert failures.count == 18
