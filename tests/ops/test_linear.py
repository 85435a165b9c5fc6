from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops.linear import linear


def tensors(num_tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (num_tokens, 48),
        "weight": (33, 48),
        "bias": (33,),
        "residual": (num_tokens, 33),
    }
    return {k: torch.randn(v, generator=generator).to(dtype) for k, v in shapes.items()}


def exact(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    y = x.double() @ weight.double().T
    for term in (bias, residual):
        if term is not None:
            y += term
    return y


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("left_out", [(), ("residual",), ("bias", "residual")])
def test_equals_float64(num_tokens: int, left_out: tuple[str, ...]) -> None:
    given = {k: v for k, v in tensors(num_tokens).items() if k not in left_out}
    got = linear(**given)
    assert_close(got.double(), exact(**given), rtol=1e-5, atol=1e-5)
    if num_tokens:
        for name in given:
            wrong = {**given, name: given[name].roll(1, -1)}
            with pytest.raises(AssertionError):
                assert_close(got.double(), exact(**wrong), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    given = tensors(6, torch.bfloat16)
    expected = exact(**given)
    assert torch.equal(linear(**given), expected.float().bfloat16())
    out = torch.empty(6, 33)
    assert linear(**given, out=out) is out
    assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_out_may_be_the_residual() -> None:
    given = tensors(5)
    expected = linear(**given)
    linear(**given, out=given["residual"])
    assert torch.equal(given["residual"], expected)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(5, 47), r"x has shape \(5, 47\) and weight \(33, 48\)"),
        ("x", torch.zeros(48), r"x has shape \(48,\)"),
        ("weight", torch.zeros(33, 48).half(), r"x is torch\.float32 and weight torch\.float16"),
        ("bias", torch.zeros(32), r"bias has shape \(32,\); weight needs \(33,\)"),
        ("residual", torch.zeros(5, 1), r"residual has shape \(5, 1\).*\(5, 33\)"),
        ("out", torch.zeros(4, 33), r"out has shape \(4, 33\); this call needs \(5, 33\)"),
    ],
)
def test_what_does_not_fit_is_named(name: str, wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**{**tensors(5), name: wrong})


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="measured with MKL only")
@pytest.mark.parametrize("in_major", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(in_major: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 256, generator=generator)
    weight = torch.randn(512, 256, generator=generator)
    weight = weight.T.contiguous().T if in_major else weight
    bias = torch.randn(512, generator=generator)
    together = linear(x, weight, bias)
    for num_tokens in (1, 2, 3, 5, 17, 64):
        for first in (0, 3):
            rows = slice(first, first + num_tokens)
            assert torch.equal(linear(x[rows], weight, bias), together[rows])
    assert not torch.equal(torch.nn.functional.linear(x[:1], weight, bias), together[:1])
