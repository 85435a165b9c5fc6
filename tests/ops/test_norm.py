from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops.norm import rms_norm


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def inputs(num_tokens: int, hidden: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=generator) * 3
    return x, torch.randn(hidden, generator=generator)


@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 8), (1, 7), (3, 64), (5, 2880)])
def test_equals_float64(num_tokens: int, hidden: int) -> None:
    x, weight = inputs(num_tokens, hidden)
    assert_close(rms_norm(x, weight, 1e-5).double(), exact(x, weight, 1e-5), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    x, weight = (t.bfloat16() for t in inputs(4, 2880))
    assert torch.equal(rms_norm(x, weight, 1e-5), exact(x, weight, 1e-5).float().bfloat16())


def test_out_may_be_x() -> None:
    x, weight = inputs(3, 64)
    expected = rms_norm(x, weight, 1e-5)
    assert rms_norm(x, weight, 1e-5, out=x) is x
    assert torch.equal(x, expected)


def test_of_some_rows() -> None:
    x, weight = inputs(5, 64)
    rows = torch.tensor([4, 0, 4])
    out = torch.empty(3, 64)
    assert rms_norm(x, weight, 1e-5, out=out, rows=rows) is out
    assert torch.equal(out, rms_norm(x, weight, 1e-5)[rows])


@pytest.mark.parametrize("wrong", ["eps", "weight", "mean"])
def test_a_wrong_norm_is_noticed(wrong: str) -> None:
    x, weight = inputs(3, 64)
    x = x * 0.01
    got = {
        "eps": rms_norm(x, weight, 1e-6),
        "weight": rms_norm(x, weight.roll(1), 1e-5),
        "mean": rms_norm(x - x.mean(-1, keepdim=True), weight, 1e-5),
    }[wrong]
    with pytest.raises(AssertionError):
        assert_close(got.double(), exact(x, weight, 1e-5), rtol=1e-5, atol=1e-5)


def test_a_weight_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(7,\); x needs \(8,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(7), 1e-5)
