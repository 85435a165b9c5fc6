from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops.attention import paged_attention


@dataclass(frozen=True)
class Case:
    """Sequences as (tokens in all, rows of this step)."""

    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    window: int = 0
    block_size: int = 4


CASES = {
    "one decode row": Case(((9, 1),)),
    "first token of all": Case(((1, 1),)),
    "whole prompt": Case(((13, 13),)),
    "last chunk of a prompt": Case(((30, 11),)),
    "mixed": Case(((9, 1), (16, 16), (33, 5), (4, 1))),
    "mixed, window": Case(((9, 1), (16, 16), (33, 5), (4, 1)), window=5),
    "window within one page": Case(((40, 1), (40, 3)), window=2, block_size=16),
    "window of one token": Case(((7, 7), (12, 1)), window=1),
    "more rows than are scored at once": Case(((300, 290),)),
    "more rows than are scored at once, window": Case(((300, 290),), window=20),
    "one kv head": Case(((20, 6),), num_heads=5, num_kv_heads=1),
    "as many kv heads": Case(((20, 6),), num_heads=3, num_kv_heads=3, window=7),
    "real head sizes": Case(((140, 3), (129, 1)), 64, 8, 64, 128, 16),
}


@dataclass(frozen=True)
class Inputs:
    """Contiguous per sequence for the reference, paged for the op."""

    q: list[Tensor]  # per sequence [rows, num_heads, head_dim]
    k: list[Tensor]  # per sequence [tokens, num_kv_heads, head_dim]
    v: list[Tensor]
    sinks: Tensor
    cache: Tensor
    block_table: Tensor


def make(case: Case) -> Inputs:
    """Unused slots and pages hold NaN; pages before every query's window are -1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 2

    size = case.block_size
    kv_shape = (case.num_kv_heads, case.head_dim)
    num_blocks = [math.ceil(length / size) for length, _ in case.sequences]
    pages = torch.randperm(sum(num_blocks) + 3, generator=generator).tolist()
    cache = torch.full((2, len(pages), size, *kv_shape), torch.nan)
    table = torch.full((len(num_blocks), max(num_blocks) + 1), -1, dtype=torch.int32)
    q, k, v = [], [], []
    for seq, (length, rows) in enumerate(case.sequences):
        q.append(normal(rows, case.num_heads, case.head_dim))
        k.append(normal(length, *kv_shape))
        v.append(normal(length, *kv_shape))
        first = max(0, length - rows - case.window + 1) // size if case.window else 0
        for block in range(first, num_blocks[seq]):
            page = pages.pop()
            table[seq, block] = page
            part = slice(block * size, min((block + 1) * size, length))
            cache[0, page, : part.stop - part.start] = k[seq][part]
            cache[1, page, : part.stop - part.start] = v[seq][part]
    return Inputs(q, k, v, normal(case.num_heads), cache, table)


def run(case: Case, x: Inputs) -> Tensor:
    starts = torch.tensor([0, *(rows for _, rows in case.sequences)]).cumsum(0).int()
    lengths = torch.tensor([length for length, _ in case.sequences]).int()
    scale = case.head_dim**-0.5
    q = torch.cat(x.q)
    return paged_attention(q, x.cache, x.block_table, starts, lengths, x.sinks, case.window, scale)


def exact(case: Case, x: Inputs) -> Tensor:
    """Query by query and head by head, in float64."""
    out = []
    for seq, (length, rows) in enumerate(case.sequences):
        for row in range(rows):
            position = length - rows + row
            first = max(0, position - case.window + 1) if case.window else 0
            for head in range(case.num_heads):
                kv_head = head // (case.num_heads // case.num_kv_heads)
                k, v = (t[seq][first : position + 1, kv_head].double() for t in (x.k, x.v))
                weights = (k @ x.q[seq][row, head].double() * case.head_dim**-0.5).exp()
                out.append(weights @ v / (weights.sum() + x.sinks[head].double().exp()))
    return torch.stack(out).view(-1, case.num_heads, case.head_dim)


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    case = CASES[name]
    x = make(case)
    assert_close(run(case, x).double(), exact(case, x), rtol=1e-4, atol=1e-5)


def test_a_sink_at_minus_infinity_is_plain_attention() -> None:
    case = CASES["whole prompt"]
    x = replace(make(case), sinks=torch.full((4,), -torch.inf))
    q, k, v = (t[0].transpose(0, 1) for t in (x.q, x.k, x.v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert_close(run(case, x), expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_a_sink_takes_probability() -> None:
    """With values of one, each output is the sum of its probabilities."""
    case = CASES["mixed, window"]
    x = make(case)
    x.cache[1][~x.cache[1].isnan()] = 1.0
    assert run(case, x).max() < 1
    without = replace(x, sinks=torch.full((4,), -torch.inf))
    assert_close(run(case, without), torch.ones_like(run(case, x)))
    many = run(case, replace(x, sinks=x.sinks + 3))
    assert (many < run(case, x)).all()


@pytest.mark.parametrize("distance", [126, 127, 128, 129])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_edge_of_a_window_of_128(distance: int, rows: int) -> None:
    """The key 127 tokens back is the last one seen."""
    case = Case(((200, rows),), window=128, block_size=16)
    x = make(replace(case, window=0))
    before = run(case, x)
    position = 199 - distance
    x.cache[1, x.block_table[0, position // 16], position % 16] += 1000
    changed = (run(case, x) != before).flatten(1).any(1)
    assert changed[-1] == (distance < 128)
    if rows == 2:
        assert changed[0] == (distance - 1 < 128)


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    case = CASES["mixed, window"]
    x = make(case)
    x = replace(x, q=[q.bfloat16() for q in x.q], cache=x.cache.bfloat16())
    wide = replace(x, q=[q.float() for q in x.q], cache=x.cache.float())
    assert torch.equal(run(case, x), run(case, wide).bfloat16())


@pytest.mark.parametrize("wrong", ["sink", "window", "pages", "heads", "zeros"])
def test_a_wrong_attention_is_noticed(wrong: str) -> None:
    case = Case(((30, 6),), window=9)
    x = make(replace(case, window=0))
    expected = exact(case, x)
    got = {
        "sink": lambda: run(case, replace(x, sinks=torch.full((4,), -torch.inf))),
        "window": lambda: run(replace(case, window=10), x),
        "pages": lambda: run(case, replace(x, block_table=x.block_table.roll(1, 1))),
        "heads": lambda: run(case, replace(x, q=[x.q[0].roll(1, 1)])).roll(-1, 1),
        "zeros": lambda: torch.zeros_like(x.q[0]),
    }[wrong]()
    with pytest.raises(AssertionError):
        assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_out_is_filled_and_returned() -> None:
    case = CASES["mixed, window"]
    x = make(case)
    starts = torch.tensor([0, *(rows for _, rows in case.sequences)]).cumsum(0).int()
    lengths = torch.tensor([length for length, _ in case.sequences]).int()
    out = torch.full_like(torch.cat(x.q), torch.nan)
    arguments = (torch.cat(x.q), x.cache, x.block_table, starts, lengths, x.sinks, 5, 8**-0.5)
    assert paged_attention(*arguments, out=out) is out
    assert torch.equal(out, run(case, x))
