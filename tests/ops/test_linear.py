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
