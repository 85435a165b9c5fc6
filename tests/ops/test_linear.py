from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from headrace.ops.linear import linear


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(num_tokens: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 48, generator=generator)
    weight = torch.randn(33, 48, generator=generator)
    bias = torch.randn(33, generator=generator) if with_bias else None
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias
    assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    if num_tokens:
        with pytest.raises(AssertionError):
            assert_close(linear(x, weight.roll(1, 0), bias).double(), expected)


def test_mixed_dtypes_are_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"x\.dtype=torch\.bfloat16"):
        linear(torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(2, 4))


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
