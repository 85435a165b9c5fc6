"""The layer's launches against float64, here in Triton's interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.bench.exact_moe import exact_layer, relative_errors
from headrace.ops.experts import Activation, Experts
from headrace.ops.experts_kernel import DenseWeight
from headrace.ops.moe import MoEBuffers, MoEWeights, moe_layer, own_buffers
from headrace.ops.moe_kernel import moe_layer_kernel
from headrace.ops.mxfp4 import MXFP4Weight
from headrace.ops.mxfp4_kernel import RowOrder, prepare
from tests.ops.test_moe import random_layer, variants

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")


def in_gpu_layout(weights: MoEWeights) -> MoEWeights:
    """The same layer as the kernels want it."""
    experts = weights.experts

    def prepared(weight: object, order: RowOrder) -> object:
        if isinstance(weight, MXFP4Weight):
            return prepare(weight.blocks, weight.scales, order)
        return DenseWeight(weight, order)

    return replace(
        weights,
        experts=replace(
            experts,
            gate_up=prepared(experts.gate_up, RowOrder.INTERLEAVED),
            down=prepared(experts.down, RowOrder.PLAIN),
        ),
    )


@interpreted
@pytest.mark.parametrize("name", variants())
def test_interpreted_layer(name: str) -> None:
    layer = variants()[name]
    h = torch.randn(9, 160, generator=torch.Generator().manual_seed(1))
    out = torch.full_like(h, float("nan"))
    got = moe_layer_kernel(h, in_gpu_layout(layer), own_buffers(9, layer, "cpu"), out)
    assert got is out
    torch.testing.assert_close(got.double(), exact_layer(h, layer), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named() -> None:
    layer = in_gpu_layout(variants()["gpt-oss"])
    h, buffers = torch.zeros(5, 160), own_buffers(5, layer, "cpu")
    narrow = torch.zeros(5, 96)
    fewer = replace(layer, experts=replace(layer.experts, down=layer.experts.down.expert(0)))
    plain = variants()["gpt-oss"]
    wrong_calls = {
        r"out has shape \(5, 159\)": (h, layer, buffers, h[:, 1:].contiguous()),
        r"out is torch.float64; pass torch.float32": (h, layer, buffers, h.double()),
        r"router weight has shape \(6, 160\)": (narrow, layer, buffers, narrow),
        r"buffers.normed has shape \(5, 160\)": (h[:4], layer, buffers, h[:4]),
        r"down has 1 experts; the router has 6": (h, fewer, buffers, h),
        r"the experts are a MXFP4Weight; make a PreparedMXFP4": (h, plain, buffers, h),
    }  # fmt: skip
    for message, arguments in wrong_calls.items():
        with pytest.raises(ValueError, match=message):
            moe_layer_kernel(*arguments)


class GpuLayer:
    """A layer of gpt-oss's size on the GPU, in checkpoint and in GPU layout."""

    def __init__(self, num_experts: int) -> None:
        self.checkpoint = random_layer(num_experts, 2880, 2880, 4, "cuda")
        self.weights = in_gpu_layout(self.checkpoint)

    def check(self, num_tokens: int) -> None:
        h = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
        buffers = own_buffers(num_tokens, self.weights, "cuda")
        buffers.activated.fill_(float("nan"))
        buffers.weighted.fill_(float("nan"))
        got = moe_layer(h, self.weights, buffers)
        rows = torch.randperm(num_tokens, device="cuda")[:256]
        ids = buffers.routing.expert_ids[rows]  # of near ties either may win
        largest, rms = relative_errors(got[rows], exact_layer(h[rows], self.checkpoint, ids))
        assert largest < 0.025, (largest, rms)
        assert rms < 0.005, (largest, rms)


@pytest.fixture(scope="module")
def layer_of_32() -> GpuLayer:
    return GpuLayer(32)


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 16, 17, 127, 128, 129, 1000, 4096])
def test_layer_of_32_experts(layer_of_32: GpuLayer, num_tokens: int) -> None:
    layer_of_32.check(num_tokens)


@gpu
def test_layer_of_128_experts() -> None:
    layer = GpuLayer(128)
    for num_tokens in (1, 2, 16, 129, 1000):
        layer.check(num_tokens)


@gpu
@pytest.mark.parametrize(("hidden", "inter"), [(512, 384), (2880, 352), (2880, 704), (2880, 1440)])
@pytest.mark.parametrize("num_experts", [32, 128])
def test_sizes_of_tensor_parallel_parts(hidden: int, inter: int, num_experts: int) -> None:
    checkpoint = random_layer(num_experts, hidden, inter, 4, "cuda")
    weights = in_gpu_layout(checkpoint)
    for num_tokens in (1, 2, 16):
        h = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
        buffers = own_buffers(num_tokens, weights, "cuda")
        expected = exact_layer(h, checkpoint, moe_ids(h, weights, buffers))
        largest, rms = relative_errors(moe_layer(h, weights, buffers), expected)
        assert largest < 0.025, (largest, rms)
        assert rms < 0.005, (largest, rms)


def moe_ids(h: Tensor, weights: MoEWeights, buffers: MoEBuffers) -> Tensor:
    moe_layer(h, weights, buffers)
    return buffers.routing.expert_ids.clone()


@gpu
def test_a_token_has_the_same_bits_in_every_batch(layer_of_32: GpuLayer) -> None:
    h = torch.randn(8192, 2880, device="cuda").bfloat16()
    weights = layer_of_32.weights
    whole = moe_layer(h, weights)
    sizes = (
        1,
        2,
        3,
        5,
        8,
        15,
        16,
        17,
        31,
        33,
        64,
        65,
        100,
        127,
        128,
        129,
        200,
        256,
        500,
        777,
        1024,
    )
    for size in (*sizes, 1024, 3000, 5000):
        rows = torch.randperm(8192, device="cuda")[:size]
        assert torch.equal(moe_layer(h[rows], weights), whole[rows]), size


@gpu
def test_other_layers() -> None:
    """SiLU, no bias of the router, weights that don't sum to one, bfloat16 experts."""
    checkpoint = random_layer(8, 512, 256, 3, "cuda")
    experts = checkpoint.experts
    plain = Experts(
        experts.gate_up.dequantize(torch.bfloat16), experts.gate_up_bias,
        experts.down.dequantize(torch.bfloat16), experts.down_bias,
        activation=Activation.SILU_AND_MUL,
    )  # fmt: skip
    other = replace(checkpoint, experts=plain, renormalize=False, router_bias=None)
    weights = in_gpu_layout(other)
    for num_tokens in (1, 40, 300):
        h = torch.randn(num_tokens, 512, device="cuda").bfloat16()
        buffers = own_buffers(num_tokens, weights, "cuda")
        expected = exact_layer(h, other, moe_ids(h, weights, buffers))
        largest, rms = relative_errors(moe_layer(h, weights, buffers), expected)
        assert largest < 0.025, (largest, rms)
        assert rms < 0.005, (largest, rms)


@gpu
@pytest.mark.parametrize("num_tokens", [3, 100, 300])
def test_nothing_is_allocated_and_a_graph_replays(layer_of_32: GpuLayer, num_tokens: int) -> None:
    h = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
    out, weights = torch.empty_like(h), layer_of_32.weights
    buffers = own_buffers(num_tokens, weights, "cuda")
    moe_layer(h, weights, buffers, out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    moe_layer(h, weights, buffers, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_layer(h, weights, buffers, out)
    for _ in range(3):
        h.copy_(torch.randn_like(h))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, moe_layer(h, weights))


@gpu
def test_a_wrong_weight_is_noticed(layer_of_32: GpuLayer) -> None:
    checkpoint = layer_of_32.checkpoint
    scales = checkpoint.experts.down.scales.clone()
    scales[:, ::7, 3] += 1
    wrong = replace(checkpoint.experts, down=MXFP4Weight(checkpoint.experts.down.blocks, scales))
    h = torch.randn(16, 2880, device="cuda").bfloat16()
    got = moe_layer(h, in_gpu_layout(replace(checkpoint, experts=wrong)))
    largest, rms = relative_errors(got, exact_layer(h, checkpoint))
    assert largest > 0.025
    assert rms > 0.005
