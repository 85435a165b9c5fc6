"""What several kernels ask of their arguments; a ValueError names the argument and what to pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rows(x: Tensor) -> None:
    """Raise ValueError unless x is contiguous rows, [num_tokens, hidden]."""
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, strides {x.stride()}; pass contiguous "
            "[num_tokens, hidden]"
        )


def check_gpu_dtype(x: Tensor) -> None:
    """Raise ValueError for a CUDA tensor of another dtype than bfloat16."""
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f"x is {x.dtype}; pass bfloat16")


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError unless it is contiguous, of this shape and this dtype."""
    if tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; pass contiguous "
            f"{tuple(shape)}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; pass {dtype}")
