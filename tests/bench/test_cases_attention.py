from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headrace.bench.cases_attention import (
    Attention,
    attention_case,
    problems,
    random_calls,
    rope_case,
)
from headrace.bench.kernels import SIZES

CPU = torch.device("cpu")
SMALL = {
    "decode": Attention("decode", 3, 1, 40, 0),
    "window": Attention("decode", 2, 1, 150, 128),
    "prompt": Attention("prompt", 2, 20, 20, 0),
    "chunk": Attention("chunk", 1, 20, 60, 16),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_wrong_result_is_noticed(name: str) -> None:
    torch.manual_seed(0)
    calls = random_calls(SMALL[name], CPU)
    calls.check()
    right = calls.run(0).clone()
    with pytest.raises(AssertionError, match="is off by"):
        calls.check_result(calls.run(1))  # other queries, keys and values
    with pytest.raises(AssertionError, match="is off by"):
        calls.check_result(right.roll(1, 1))
    right[-1, -1, -1] = math.nan
    with pytest.raises(AssertionError, match="not written"):
        calls.check_result(right)


@pytest.mark.parametrize("name", SMALL)
def test_keys_are_counted(name: str) -> None:
    problem = SMALL[name]
    rows = range(problem.context - problem.query_len, problem.context)
    window = problem.window or problem.context
    seen = [set(range(max(0, p - window + 1), p + 1)) for p in rows]
    assert problem.keys_scored == problem.num_seqs * sum(map(len, seen))
    assert problem.keys_read == problem.num_seqs * len(set.union(*seen))


def test_bytes_and_flops() -> None:
    case = attention_case(random_calls(SMALL["decode"], CPU))
    assert case.num_flops == 2 * 2 * 3 * 40 * 64 * 64
    assert case.num_bytes == 2 * (2 * 3 * 40 * 8 * 64 + 2 * 3 * 64 * 64)
    assert case.name == "attention step=decode context=40 window=0"
    assert case.num_tokens == 3


def test_problems() -> None:
    found = list(problems(SIZES))
    assert len(set(found)) == len(found)
    assert replace(found[0], num_seqs=128, context=8192) in found
    assert Attention("decode", 1, 1, 131072, 0) in found
    assert Attention("prompt", 16, 512, 512, 128) in found
    assert Attention("chunk", 1, 2048, 131072, 0) in found
    assert list(problems([3])) == [
        Attention("decode", 3, 1, 600, 0),
        Attention("decode", 3, 1, 8192, 0),
        Attention("decode", 3, 1, 600, 128),
    ]


def test_rope_case() -> None:
    torch.manual_seed(0)
    case = rope_case(5, CPU)
    case.check()
    assert case.num_bytes == 5 * 80 * 64 * 2 * 2 + 5 * 32 * 4 * 2
