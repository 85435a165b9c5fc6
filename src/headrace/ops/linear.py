"""Dense linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# MKL takes another kernel, with another order of summation, for rows beyond a multiple of 4, and
# for fewer than 8 (measured with its AVX-512, AVX2 and SSE paths). Eight rows take about as long
# as one: both wait for the weights.
_ROWS_TOGETHER = 8


def linear(
    x: Tensor,  # [num_tokens, in_features]
    weight: Tensor,  # [out_features, in_features], x's dtype
    bias: Tensor | None = None,  # [out_features]
) -> Tensor:
    """y = x W^T + b. Returns [num_tokens, out_features] in x's dtype.

    On the CPU a row's result does not depend on the rows beside it, see _ROWS_TOGETHER.
    """
    assert x.dtype == weight.dtype, f"{x.dtype=} {weight.dtype=}"
    missing = -len(x) % _ROWS_TOGETHER
    if x.is_cpu and missing:
        return F.linear(F.pad(x, (0, 0, 0, missing)), weight, bias)[: len(x)]
    return F.linear(x, weight, bias)
