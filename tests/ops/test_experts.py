from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops.experts import Experts, grouped_linear, moe, swiglu
from headrace.ops.mxfp4 import MXFP4Weight, quantize

ALPHA, LIMIT = 1.702, 7.0


def make_experts(num_experts: int, hidden: int, inter: int) -> Experts:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    return Experts(
        gate_up=normal(num_experts, 2 * inter, hidden, std=4 * hidden**-0.5),
        gate_up_bias=normal(num_experts, 2 * inter, std=1.0),
        down=normal(num_experts, hidden, inter, std=inter**-0.5),
        down_bias=normal(num_experts, hidden, std=1.0),
        alpha=ALPHA,
        limit=LIMIT,
    )


def make_tokens(num_tokens: int, hidden: int, num_experts: int, top_k: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=generator)
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    return x, scores.argsort(-1)[:, :top_k], scores.softmax(-1)[:, :top_k]


def exact(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Token by token and expert by expert, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            gate_up = experts.gate_up[expert].double() @ row + experts.gate_up_bias[expert]
            gate, up = gate_up[0::2].clamp(max=LIMIT), gate_up[1::2].clamp(-LIMIT, LIMIT)
            act = gate / (1 + (-ALPHA * gate).exp()) * (up + 1)
            out[token] += weight * (experts.down[expert].double() @ act + experts.down_bias[expert])
    return out


def close(got: Tensor, expected: Tensor) -> None:
    assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 5, 2), (1, 5, 1), (1, 32, 4), (2, 8, 8), (16, 32, 4), (100, 5, 3)],
)
def test_equals_float64(num_tokens: int, num_experts: int, top_k: int) -> None:
    experts = make_experts(num_experts, 20, 12)
    tokens = make_tokens(num_tokens, 20, num_experts, top_k)
    close(moe(*tokens, experts), exact(*tokens, experts))


def test_all_tokens_on_one_expert() -> None:
    experts = make_experts(8, 20, 12)
    x, _, weights = make_tokens(9, 20, 8, 1)
    ids = torch.full((9, 1), 6)
    close(moe(x, ids, weights, experts), exact(x, ids, weights, experts))


def test_packed_experts_equal_their_dequantized_form() -> None:
    dense = make_experts(5, 64, 32)
    packed = replace(
        dense,
        gate_up=MXFP4Weight(*quantize(dense.gate_up)),
        down=MXFP4Weight(*quantize(dense.down)),
    )
    unpacked = replace(
        dense,
        gate_up=packed.gate_up.dequantize(torch.float32),
        down=packed.down.dequantize(torch.float32),
    )
    tokens = make_tokens(7, 64, 5, 2)
    assert torch.equal(moe(*tokens, packed), moe(*tokens, unpacked))
    swapped = replace(packed.gate_up, scales=packed.gate_up.scales.flip(0))
    with pytest.raises(AssertionError):
        close(moe(*tokens, replace(packed, gate_up=swapped)), exact(*tokens, unpacked))


def test_experts_without_tokens_are_not_read() -> None:
    experts = make_experts(6, 20, 12)
    x, _, weights = make_tokens(4, 20, 6, 2)
    ids = torch.tensor([[1, 4], [4, 1], [1, 4], [1, 4]])
    expected = moe(x, ids, weights, experts)
    for tensor in (experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias):
        tensor[[0, 2, 3, 5]] = torch.nan
    assert torch.equal(moe(x, ids, weights, experts), expected)


@pytest.mark.parametrize("limit", [7.0, 1.0])
def test_swiglu(limit: float) -> None:
    """Gates are clamped from above only, ups on both sides."""
    gate = torch.tensor([-9.0, -1.0, 0.0, 0.5, 9.0])
    up = torch.tensor([-9.0, 9.0, 3.0, -0.5, 2.0])
    got = swiglu(torch.stack((gate, up), -1).flatten(), ALPHA, limit)
    g, u = gate.double().clamp(max=limit), up.double().clamp(-limit, limit)
    close(got, g * torch.sigmoid(ALPHA * g) * (u + 1))
    if limit == 7.0:
        assert got[0].item() == pytest.approx(-9 / (1 + 2.718281828 ** (9 * ALPHA)) * -6, rel=1e-4)


def test_counts_must_cover_the_rows() -> None:
    experts = make_experts(3, 20, 12)
    with pytest.raises(AssertionError, match="counts="):
        grouped_linear(torch.zeros(4, 20), [1, 1, 1], experts.gate_up, experts.gate_up_bias)


@pytest.mark.parametrize(
    "wrong",
    ["gate and up swapped", "halves", "down bias", "up plus one", "weights", "neighbour", "zeros"],
)
def test_a_wrong_expert_layer_is_noticed(wrong: str) -> None:
    experts = make_experts(5, 20, 12)
    x, ids, weights = make_tokens(6, 20, 5, 2)
    expected = exact(x, ids, weights, experts)
    pairs = experts.gate_up.unflatten(1, (-1, 2))
    broken = {
        "gate and up swapped": replace(experts, gate_up=pairs.flip(2).flatten(1, 2)),
        "halves": replace(experts, gate_up=pairs.transpose(1, 2).flatten(1, 2)),
        "down bias": replace(experts, down_bias=torch.zeros_like(experts.down_bias)),
        "up plus one": replace(experts, gate_up_bias=experts.gate_up_bias - 1),
    }.get(wrong, experts)
    if wrong == "weights":
        weights = weights.flip(1)
    if wrong == "neighbour":
        ids = (ids + 1) % 5
    got = moe(x, ids, weights, broken) * (wrong != "zeros")
    with pytest.raises(AssertionError):
        close(got, expected)
