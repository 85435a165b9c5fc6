"""x A^T within the experts' matmul against two launches, bit for bit, here and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops import lora_kernel, routing_kernel, sort_kernel
from headrace.ops.experts_kernel import grouped_matmul
from headrace.ops.lora_kernel import NUM_SLICES, pair_parts, shrink_experts
from headrace.ops.tiles import MoETiles, Problem, Tile, choose
from tests.ops.test_experts_kernel import Weights, routing, run_layer
from tests.ops.test_lora_kernel import LayerAdapters, take

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")
EXPERTS, HIDDEN, INTER, TOP_K = 3, 640, 288, 2  # of the interpreted layer: K has three slices
TILE = Tile(16, 128)
# [gate_up, down] of each adapter: in both, one only, neither, more than one tile of rank
RANKS = [[8, 0, 40, 0, 72], [16, 3, 0, 0, 20]]


class SmallLayer:
    """Experts with adapters, for the interpreter."""

    def __init__(self, num_tokens: int) -> None:
        torch.manual_seed(num_tokens)
        self.weights = Weights(EXPERTS, HIDDEN, INTER, "cpu")
        self.kernel_weights = self.weights.kernel_weights()
        self.biases = self.weights.gate_up_bias.float(), self.weights.down_bias.float()
        self.adapters = LayerAdapters(self.weights, *RANKS, "cpu", torch.float32)
        self.x = torch.randn(num_tokens, HIDDEN)
        self.ids, self.routing_weights = routing(num_tokens, EXPERTS, TOP_K, "cpu")

    def run(self, slots: Tensor) -> Tensor:
        return self.adapters.run(
            self.x, self.ids, self.routing_weights, slots, MoETiles(TILE, TILE), self.biases,
            self.kernel_weights,
        )  # fmt: skip

    def base(self) -> Tensor:
        return run_layer(
            self.x, self.ids, self.routing_weights, self.kernel_weights, self.biases,
            MoETiles(TILE, TILE), EXPERTS,
        )  # fmt: skip


@interpreted
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 30])
def test_interpreted_one_launch_has_the_bits_of_two(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = SmallLayer(num_tokens)
    slots = torch.arange(num_tokens) % 6
    slots[slots == 5] = -1
    out = layer.run(slots)
    monkeypatch.setattr(lora_kernel, "FEW_PAIRS", 0)
    # a product here is numpy's: its bits depend on BLOCK_K
    monkeypatch.setattr(
        lora_kernel, "_shrink_tile", lambda work: lora_kernel._ShrinkTile(64, 64, 4)
    )
    assert torch.equal(out, layer.run(slots))
    base = layer.base()
    unchanged = (slots < 0) | (slots == 3)  # none, and one of nothing
    assert torch.equal(out[unchanged], base[unchanged])
    assert (out[~unchanged] != base[~unchanged]).any(1).all()


@interpreted
def test_interpreted_nobody_has_an_adapter() -> None:
    layer = SmallLayer(5)
    assert torch.equal(layer.run(torch.full((5,), -1)), layer.base())


@interpreted
@pytest.mark.parametrize("matmul", [0, 1])
def test_interpreted_programs_are_counted(matmul: int) -> None:
    """One matmul, without the other: the blocks that count are those that wait, for as many."""
    layer = SmallLayer(9)
    slots = torch.tensor([-1, 3, -1, 0, -1, -1, -1, -1, -1]).int()
    layer.ids[:] = torch.tensor([0, 1])
    layer.ids[3, 1] = 2  # the adapter of nothing in blocks of experts 0 and 1, the other in 0 and 2
    buffers = routing_kernel.allocate(9, HIDDEN, EXPERTS, TOP_K, 16, torch.float32, "cpu")
    buffers.sorted.blocks.fill_(-7)
    sort = sort_kernel.sort(layer.ids, range(EXPERTS), buffers, 16)
    assert sort.blocks[:, :2].tolist() == [[0, 0], [1, 9], [2, 17]]
    site, memory = layer.adapters.matmuls[matmul].site, layer.adapters.matmuls[matmul].memory
    x = layer.x if matmul == 0 else torch.randn(18, INTER)
    out = torch.empty(18, [2 * INTER, HIDDEN][matmul])
    parts = pair_parts(take("cpu"), 18, 72)

    def run(slots: Tensor) -> Tensor:
        low_rank = shrink_experts(x, site, memory, slots, sort, 16, TOP_K, matmul == 0, parts)
        weight, bias = layer.kernel_weights[matmul], layer.biases[matmul]
        call = x, weight, bias, sort, TILE, out, TOP_K, matmul == 0
        return grouped_matmul(*call, low_rank=low_rank)

    run(torch.full_like(slots, -1))
    assert sort.blocks[:, 3].tolist() == [0, 0, 0]
    run(slots)
    programs = NUM_SLICES * 2 * 2  # that share adapters, and tiles of rank
    assert sort.blocks[:, 3].tolist() == [(programs + 1) << 16 * matmul] * 3
    assert out.isfinite().all()


@interpreted
def test_interpreted_a_wrong_slice_is_noticed() -> None:
    """A's last slice of K at one rank: only programs of that slice read it."""
    layer = SmallLayer(2)
    slots = torch.tensor([2, 2])
    out = layer.run(slots)
    gate_up = layer.adapters.matmuls[0]
    gate_up.memory[int(gate_up.site.a[0, 2]) :][: EXPERTS * 40 * HIDDEN].view(-1, HIDDEN)[
        ::40, -1
    ] += 1
    assert (layer.run(slots) != out).any(1).all()


@pytest.fixture(scope="module")
def gpu_layer() -> tuple[LayerAdapters, tuple[Tensor, Tensor], object]:
    """gpt-oss's experts with adapters of many ranks."""
    weights = Weights(32, 2880, 2880)
    ranks = [64, 16, 8, 0, 1, 0, 200], [64, 16, 8, 32, 0, 0, 512]
    adapters = LayerAdapters(weights, *ranks, "cuda", torch.bfloat16)
    return adapters, (weights.gate_up_bias, weights.down_bias), weights.kernel_weights()


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 16, 33, 64, 65, 100, 128, 129, 200, 256])
def test_one_launch_has_the_bits_of_two(
    gpu_layer: tuple, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when replayed many times: a program that did not wait would read NaN."""
    adapters, biases, kernel_weights = gpu_layer
    tiles = choose(Problem(num_tokens * 4, 32))
    x = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
    ids, weights = routing(num_tokens, 32, 4, "cuda")
    slots = (torch.arange(num_tokens, device="cuda") % 8 - 1).int()
    slots[0] = 0
    call = x, ids, weights, slots, tiles, biases, kernel_weights
    adapters.run(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = adapters.run(*call)  # fills its buffers with NaN first
    monkeypatch.setattr(lora_kernel, "FEW_PAIRS", 0)
    expected = adapters.run(*call)
    assert expected.isfinite().all()
    for replay in range(50):
        graph.replay()
        assert torch.equal(out, expected), replay
