"""One layer against float64, expert by expert; here on the CPU and, from the same code, the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.bench.exact_moe import exact_layer, exact_logits, relative_errors
from headrace.ops.experts import Activation, Experts
from headrace.ops.moe import MoEWeights, moe_layer
from headrace.ops.mxfp4 import MXFP4Weight
from headrace.ops.norm import NextNorm, rms_norm


def random_layer(
    num_experts: int, hidden: int, inter: int, top_k: int, device: str = "cpu"
) -> MoEWeights:
    """A layer in checkpoint layout, with MXFP4 experts; float32, but bfloat16 on the GPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = {"device": device, "generator": generator}

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, **options) * std).to(dtype)

    def packed(rows: int, columns: int) -> MXFP4Weight:
        shape = (num_experts, rows, columns // 32)
        return MXFP4Weight(
            torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, **options),
            torch.randint(118, 122, shape, dtype=torch.uint8, **options),
        )

    return MoEWeights(
        norm=normal(hidden, std=0.1) + 1,
        eps=1e-5,
        router=normal(num_experts, hidden, std=0.1),
        router_bias=normal(num_experts, std=0.1),
        experts=Experts(
            gate_up=packed(2 * inter, hidden),
            gate_up_bias=normal(num_experts, 2 * inter, std=0.5),
            down=packed(hidden, inter),
            down_bias=normal(num_experts, hidden, std=0.5),
        ),
        top_k=top_k,
    )


def variants() -> dict[str, MoEWeights]:
    """gpt-oss, and what other models need."""
    layer = random_layer(6, 160, 96, 3)
    experts = layer.experts
    assert isinstance(experts.gate_up, MXFP4Weight)
    assert isinstance(experts.down, MXFP4Weight)
    gate_up, down = (w.dequantize(torch.float32) for w in (experts.gate_up, experts.down))
    return {
        "gpt-oss": layer,
        "not renormalized": replace(layer, renormalize=False, router_bias=None),
        "SiLU": replace(layer, experts=replace(experts, activation=Activation.SILU_AND_MUL)),
        "dense": replace(layer, experts=replace(experts, gate_up=gate_up, down=down)),
    }


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_equals_float64(name: str, num_tokens: int) -> None:
    layer = variants()[name]
    h = torch.randn(num_tokens, 160, generator=torch.Generator().manual_seed(1))
    out = torch.full_like(h, float("nan"))
    got = moe_layer(h, layer, out=out)
    assert got is out
    torch.testing.assert_close(got.double(), exact_layer(h, layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_the_next_norm_is_that_of_the_sum(num_tokens: int) -> None:
    layer, h = variants()["gpt-oss"], torch.randn(num_tokens, 160)
    next_norm = NextNorm(torch.randn(160), 1e-2, torch.full_like(h, float("nan")))
    out = moe_layer(h, layer, next_norm=next_norm)
    assert torch.equal(out, moe_layer(h, layer))
    assert torch.equal(next_norm.out, rms_norm(out, next_norm.weight, 1e-2))
    with pytest.raises(ValueError, match=r"out has shape \(2, 160\)"):
        moe_layer(h, layer, next_norm=replace(next_norm, out=torch.empty(2, 160)))


def test_the_layer_is_exact_for_a_norm_in_its_dtype() -> None:
    """What a router of wide logits makes of the norm's rounding is no error of the layer."""
    layer = variants()["gpt-oss"]
    weights = replace(layer, norm=layer.norm.bfloat16(), router=10 * layer.router)
    h = torch.randn(40, 160, generator=torch.Generator().manual_seed(1)).bfloat16()
    x, logits = exact_logits(h, weights)
    rounded = rms_norm(h, weights.norm, weights.eps)
    torch.testing.assert_close(x, rounded.double(), rtol=2**-7, atol=0)
    assert torch.equal(x, x.bfloat16().double())
    expected = x @ weights.router.double().T + layer.router_bias.double()
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("change", ["norm", "bias", "residual", "activation", "renormalize"])
def test_a_wrong_layer_is_noticed(change: str) -> None:
    layer, h = variants()["gpt-oss"], torch.randn(40, 160)
    wrong = {
        "norm": replace(layer, norm=torch.ones(160)),
        "bias": replace(layer, experts=replace(layer.experts, down_bias=torch.zeros(6, 160))),
        "residual": layer,
        "activation": variants()["SiLU"],
        "renormalize": replace(layer, renormalize=False),
    }[change]
    got = moe_layer(h, wrong) - (h if change == "residual" else 0)
    largest, rms = relative_errors(got, exact_layer(h, layer))
    assert largest > 0.025
    assert rms > 0.005
