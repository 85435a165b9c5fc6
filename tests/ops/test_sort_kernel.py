"""Slots sorted by expert against Python's sort, here in Triton's interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from torch import Tensor

from headrace.ops.routing import RoutingBuffers, routing_counters
from headrace.ops.routing_kernel import allocate
from headrace.ops.sort_kernel import check_ids, sort

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")


def check_sorted(buffers: RoutingBuffers, ids: Tensor, block_m: int, local: range) -> None:
    """Rows by expert, then by slot; all of them once in blocks of an expert, of block_m at most."""
    flat = ids.flatten().tolist()
    held = [slot for slot in range(len(flat)) if flat[slot] in local]
    expected = sorted(held, key=lambda slot: (flat[slot], slot))
    assert buffers.sorted.slots.tolist()[: len(expected)] == expected
    rows: list[int] = []
    for expert, start, end, _ in buffers.sorted.blocks.tolist():
        if expert >= 0:
            assert 0 < end - start <= block_m
            assert {flat[expected[row]] for row in range(start, end)} == {expert + local.start}
            rows += range(start, end)
        else:
            assert expert == -1
    assert rows == list(range(len(expected)))


def check(
    ids: Tensor, num_experts: int, block_m: int = 16, local: range | None = None
) -> RoutingBuffers:
    local = local or range(num_experts)
    num_tokens, top_k = ids.shape
    buffers = allocate(
        num_tokens, 64, num_experts, top_k, block_m, torch.float32, ids.device, len(local)
    )
    for part in (buffers.sorted.slots, buffers.sorted.blocks, buffers.ranks, buffers.histograms):
        part.fill_(-7)
    assert sort(ids, local, buffers, block_m) is buffers.sorted
    if num_tokens:
        check_sorted(buffers, ids, block_m, local)
    return buffers


def random_ids(num_tokens: int, top_k: int, num_experts: int, device: str = "cpu") -> Tensor:
    """Some are -1, and a token may have an expert twice."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    return ids.int().to(device)


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "local"),
    [
        (0, 4, 8, None),
        (1, 4, 128, None),
        (17, 3, 12, range(4, 9)),
        (129, 6, 32, None),  # two groups of chunks
        (300, 1, 5, range(1)),
    ],
)
def test_interpreted_sort(
    num_tokens: int, top_k: int, num_experts: int, local: range | None
) -> None:
    check(random_ids(num_tokens, top_k, num_experts), num_experts, local=local)


@interpreted
def test_interpreted_one_expert_has_all() -> None:
    buffers = check(torch.full((40, 2), 3, dtype=torch.int32), 8, block_m=32)
    assert buffers.sorted.blocks.tolist()[:3] == [[3, 0, 32, 0], [3, 32, 64, 0], [3, 64, 80, 0]]


@interpreted
def test_interpreted_nobody_has_a_token() -> None:
    buffers = check(torch.full((20, 2), -1, dtype=torch.int32), 8)
    assert set(buffers.sorted.blocks[:, 0].tolist()) == {-1}


def test_a_wrong_order_is_noticed() -> None:
    ids = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    buffers = allocate(2, 64, 2, 2, 16, torch.float32, "cpu")
    buffers.sorted.blocks[:, 0] = -1
    buffers.sorted.blocks[:2] = torch.tensor([[0, 0, 2, 0], [1, 2, 4, 0]])
    buffers.sorted.slots.copy_(torch.tensor([1, 2, 0, 3]))
    check_sorted(buffers, ids, 16, range(2))
    buffers.sorted.slots.copy_(torch.tensor([2, 1, 0, 3]))
    with pytest.raises(AssertionError):
        check_sorted(buffers, ids, 16, range(2))


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.zeros(40, 2, dtype=torch.int32)
    buffers = allocate(40, 64, 8, 2, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"expert_ids is torch.int64; pass torch.int32"):
        sort(ids.long(), range(8), buffers, 16)
    with pytest.raises(ValueError, match=r"expert_ids has shape \(39, 2\)"):
        sort(ids[:39], range(8), buffers, 16)
    with pytest.raises(ValueError, match=r"expert_ids has shape \(40, 2\), strides \(1, 40\)"):
        sort(ids.T.contiguous().T, range(8), buffers, 16)
    with pytest.raises(ValueError, match=r"local is range\(4, 9\); pass a range within the 8"):
        sort(ids, range(4, 9), buffers, 16)
    with pytest.raises(ValueError, match=r"buffers have 12 blocks; 80 slots .* 8 rows need 17"):
        sort(ids, range(8), buffers, 8)
    with pytest.raises(ValueError, match=r"counters are for 16 tokens"):
        sort(ids, range(8), replace(buffers, counters=routing_counters(16, "cpu")), 16)
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    ids[7, 1] = 8
    with pytest.raises(ValueError, match="expert_ids has 8; pass 0 to 7, or -1"):
        sort(ids, range(8), buffers, 16)


def test_ids_in_range_pass() -> None:
    check_ids(torch.tensor([[-1, 0, 7]], dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="has -2"):
        check_ids(torch.tensor([[-2]], dtype=torch.int32), 8)


@gpu
@pytest.mark.parametrize("num_experts", [8, 32, 128])
@pytest.mark.parametrize("top_k", [1, 4, 8])
def test_sort(num_experts: int, top_k: int) -> None:
    for num_tokens in (1, 2, 15, 16, 17, 127, 128, 129, 1000, 8192):
        for local in (range(num_experts), range(3, num_experts - 2)):
            ids = random_ids(num_tokens, top_k, num_experts, "cuda")
            check(ids, num_experts, 64, local)
