"""Where an op computes: its Triton kernel, or the plain-torch reference."""

from __future__ import annotations

from torch import Tensor


def takes_kernel(x: Tensor) -> bool:
    """Whether ops compute x with their kernels: CUDA tensors."""
    return x.is_cuda
