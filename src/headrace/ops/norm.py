"""Root-mean-square normalisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32. Returns y in x's shape and dtype."""
    assert x.shape[-1:] == weight.shape, f"{x.shape=} {weight.shape=}"
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def add_rms_norm(
    x: Tensor,  # [num_tokens, hidden]
    residual: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """r = residual + x; y = rms_norm(r). Returns y and r, both [num_tokens, hidden]."""
    assert x.shape == residual.shape, f"{x.shape=} {residual.shape=}"
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
