"""Where an op computes: its Triton kernel, or the plain-torch reference."""

from __future__ import annotations

import torch
from torch import Tensor


def takes_kernel(x: Tensor) -> bool:
    """Whether ops compute x with their kernels: CUDA tensors."""
    return x.is_cuda


def is_hopper(x: Tensor) -> bool:
    """Whether x's GPU has TMA, bulk prefetch and programmatic dependent launch: from sm_90 on."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
