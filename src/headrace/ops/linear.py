"""Dense linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,  # [num_tokens, in_features]
    weight: Tensor,  # [out_features, in_features], x's dtype
    bias: Tensor | None = None,  # [out_features]
) -> Tensor:
    """y = x W^T + b. Returns [num_tokens, out_features] in x's dtype."""
    assert x.dtype == weight.dtype, f"{x.dtype=} {weight.dtype=}"
    return F.linear(x, weight, bias)
