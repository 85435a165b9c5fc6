"""The reference of the adapters' ops against plain sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops.lora import (
    LoraRows,
    LoraSite,
    add_expert_lora,
    add_lora,
    add_lora_embedding,
)

SLOTS = 4
RANKS = (3, 0, 17)  # of slots 0 to 2; the last slot is never filled
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest value


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Factors:
    """Random factors of some slots, in a memory whose other elements are NaN."""

    def __init__(
        self, in_features: int, widths: tuple[int, ...], num_experts: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(in_features)
        shape = len(widths), SLOTS
        self.a, self.b = {}, {}
        starts_a, starts_b = torch.zeros(shape).long(), torch.zeros(shape).long()
        ranks = torch.zeros(shape).int()
        self.scale = torch.rand(shape, generator=generator) + 0.5
        pieces, size = [], 0
        for segment, width in enumerate(widths):
            for slot, rank in enumerate(RANKS):
                ranks[segment, slot] = rank
                for starts, kept, columns in (
                    (starts_a, self.a, in_features),
                    (starts_b, self.b, width),
                ):
                    factor = torch.randn(num_experts, rank, columns, generator=generator).to(dtype)
                    gap = torch.full((5,), torch.nan, dtype=dtype)
                    starts[segment, slot] = size
                    kept[segment, slot] = factor.double()
                    pieces += [factor.flatten(), gap]
                    size += factor.numel() + len(gap)
        self.memory = torch.cat(pieces)
        self.site = LoraSite(
            in_features, widths, num_experts, starts_a, starts_b, ranks, self.scale
        )

    def delta(self, x: Tensor, segment: int, slot: int, expert: int = 0) -> Tensor:
        a, b = self.a[segment, slot][expert], self.b[segment, slot][expert]
        return x.double() @ a.T @ b * self.scale[segment, slot].double()


def rows_of(slots: list[int]) -> LoraRows:
    """By the definition: rows of each slot in rising order, those without one last."""
    used = sorted({slot for slot in slots if slot >= 0})
    grouped = [[i for i, s in enumerate(slots) if s == slot] for slot in used]
    order = [i for group in grouped for i in group] + [i for i, s in enumerate(slots) if s < 0]
    ends = torch.tensor([len(group) for group in grouped]).cumsum(0).tolist()
    starts = [0, *ends] + [ends[-1] if ends else 0] * (SLOTS - len(used))
    active = used + [-1] * (SLOTS - len(used))
    return LoraRows(*(torch.tensor(values).int() for values in (slots, order, active, starts)))


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(24,), (24, 8, 8)])
def test_dense(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    factors = Factors(40, widths, 1, dtype)
    slots = [2, -1, 0, 2, 1, -1, 0, 2, 2]
    x = torch.randn(len(slots), 40).to(dtype)
    y = torch.randn(len(slots), sum(widths)).to(dtype)
    before, expected = y.clone(), y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [factors.delta(x[row], s, slot) for s in range(len(widths))]
            expected[row] += torch.cat(parts)
    assert add_lora(y, x, factors.site, factors.memory, rows_of(slots)) is y
    assert_near(y, expected, dtype)
    untouched = [i for i, slot in enumerate(slots) if slot in (-1, 1)]  # slot 1 has rank 0
    assert torch.equal(y[untouched], before[untouched])
    for row, slot in enumerate(slots):  # a row alone has the same bits
        alone = before[row : row + 1].clone()
        add_lora(alone, x[row : row + 1], factors.site, factors.memory, rows_of([slot]))
        assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts(dtype: torch.dtype) -> None:
    factors = Factors(16, (24,), 5, dtype)
    experts, slots = torch.tensor([0, 4, 4, 2, 0, 4]), torch.tensor([0, 2, -1, 2, 0, 2]).int()
    x, y = torch.randn(6, 16).to(dtype), torch.randn(6, 24).to(dtype)
    before, expected = y.clone(), y.double()
    for row, (expert, slot) in enumerate(zip(experts.tolist(), slots.tolist(), strict=True)):
        if slot >= 0:
            expected[row] += factors.delta(x[row], 0, slot, expert)
    add_expert_lora(y, x, experts, slots, factors.site, factors.memory)
    assert_near(y, expected, dtype)
    assert torch.equal(y[2], before[2])
    swapped = before.clone()
    add_expert_lora(swapped, x, experts.flip(0), slots, factors.site, factors.memory)
    assert (swapped.double() - expected).abs().max() > 0.1  # another expert's factors would show


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_embedding(dtype: torch.dtype) -> None:
    factors = Factors(50, (12,), 1, dtype)
    tokens, slots = torch.tensor([49, 7, 7, 0]), [2, 0, -1, 0]
    y = torch.randn(4, 12).to(dtype)
    expected = y.double()
    one_hot = torch.nn.functional.one_hot(tokens, 50)
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row] += factors.delta(one_hot[row], 0, slot)
    add_lora_embedding(y, tokens, factors.site, factors.memory, rows_of(slots))
    assert_near(y, expected, dtype)


def test_no_rows() -> None:
    factors = Factors(40, (24,), 1, torch.float32)
    y = torch.empty(0, 24)
    assert add_lora(y, torch.empty(0, 40), factors.site, factors.memory, rows_of([])) is y
