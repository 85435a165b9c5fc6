from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops.routing import route


def inputs(num_tokens: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 24, generator=generator)
    weight = torch.randn(num_experts, 24, generator=generator)
    return x, weight, torch.randn(num_experts, generator=generator)


def exact(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The other way round: softmax over all experts, then the chosen ones renormalised."""
    probabilities = (x.double() @ weight.double().T + bias).softmax(-1)
    values, ids = probabilities.topk(top_k)
    return ids, values / values.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(1, 5, 1), (7, 8, 8), (0, 5, 2), (100, 32, 4), (3, 128, 4), (2, 1, 1)],
)
def test_equals_float64(num_tokens: int, num_experts: int, top_k: int) -> None:
    args = inputs(num_tokens, num_experts)
    ids, weights = route(*args, top_k)
    expected_ids, expected_weights = exact(*args, top_k)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lower_expert() -> None:
    bias = torch.zeros(128)
    bias[[90, 40, 70]] = 1.0
    ids, weights = route(torch.zeros(3, 24), torch.zeros(128, 24), bias, 5)
    assert ids.tolist() == [[40, 70, 90, 0, 1]] * 3
    assert weights[0, 0] == weights[0, 2] > weights[0, 3] == weights[0, 4]


@pytest.mark.parametrize("wrong", ["bias", "softmax over all"])
def test_a_wrong_router_is_noticed(wrong: str) -> None:
    x, weight, bias = inputs(50, 8)
    expected = exact(x, weight, bias, 3)
    if wrong == "bias":
        ids, weights = route(x, weight, torch.zeros_like(bias), 3)
    else:
        ids, weights = route(x, weight, bias, 8)
        ids, weights = ids[:, :3], weights[:, :3]
    with pytest.raises(AssertionError):
        assert_close((ids, weights.double()), expected, rtol=1e-5, atol=1e-6)


def test_more_choices_than_experts_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="top_k=6"):
        route(*inputs(1, 5), 6)
