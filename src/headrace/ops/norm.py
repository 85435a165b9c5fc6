"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops import dispatch


def rms_norm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [num_tokens, hidden]; may be x
    next_weight: Tensor | None = None,  # any 16-bit weight that a later kernel reads
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once.

    Returns out, or a new tensor of x's shape and dtype. next_weight is brought into L2 meanwhile,
    where the GPU can (sm_90). Raises ValueError where the shapes do not fit.
    """
    if dispatch.takes_kernel(x):
        from headrace.ops import norm_kernel

        out = torch.empty_like(x) if out is None else out
        return norm_kernel.rms_norm(x, weight, eps, out, next_weight)
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x needs {(x.shape[-1],)}")
    y = F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return y if out is None else out.copy_(y)
