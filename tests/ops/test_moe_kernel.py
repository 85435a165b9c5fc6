"""The layer's launches against float64, here in Triton's interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.bench.exact_moe import exact_layer
from headrace.ops.experts_kernel import DenseWeight
from headrace.ops.moe import MoEWeights, own_buffers
from headrace.ops.moe_kernel import moe_layer_kernel
from headrace.ops.mxfp4 import MXFP4Weight
from headrace.ops.mxfp4_kernel import RowOrder, prepare
from tests.ops.test_moe import variants

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
    h = torch.randn(20, 160, generator=torch.Generator().manual_seed(1))
    out = torch.full_like(h, float("nan"))
    got = moe_layer_kernel(h, in_gpu_layout(layer), own_buffers(20, layer, "cpu"), out)
    assert got is out
    torch.testing.assert_close(got.double(), exact_layer(h, layer), rtol=1e-4, atol=1e-4)
