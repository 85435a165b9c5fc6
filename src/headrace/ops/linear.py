"""Dense linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.ops import dispatch

# MKL takes another kernel, with another order of summation, for rows beyond a multiple of 4, and
# for fewer than 8 (measured with its AVX-512, AVX2 and SSE paths). Eight rows take about as long
# as one: both wait for the weights.
_ROWS_TOGETHER = 8


def linear(
    x: Tensor,  # [num_tokens, in_features]
    weight: Tensor,  # [out_features, in_features], x's dtype
    bias: Tensor | None = None,  # [out_features]
    residual: Tensor | None = None,  # [num_tokens, out_features]
    out: Tensor | None = None,  # [num_tokens, out_features], x's dtype or float32; may be residual
    next_weight: Tensor | None = None,  # any 16-bit weight that a later kernel reads
) -> Tensor:
    """y = x W^T + b + residual, summed in float32 in this order and rounded once.

    Returns out, or a new tensor of x's dtype. A row of y has the same bits whatever the other
    rows, and however many: see _ROWS_TOGETHER and `linear_kernel`. next_weight is brought into L2
    meanwhile, where the GPU can (sm_90): of use if the kernels in between leave the memory idle.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    if out is None:
        out = x.new_empty(len(x), len(weight))
    if dispatch.takes_kernel(x):
        from headrace.ops import linear_kernel

        return linear_kernel.linear(x, weight, bias, residual, out, next_weight)
    check(x, weight, bias, residual, out)
    wide = F.pad(x.float(), (0, 0, 0, -len(x) % _ROWS_TOGETHER))
    y = F.linear(wide, weight.float(), None if bias is None else bias.float())[: len(x)]
    return out.copy_(y if residual is None else y + residual)


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    """Raise ValueError, naming the argument, where one does not fit the others."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "pass [num_tokens, in_features] and [out_features, in_features]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; convert one of them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; weight needs ({len(weight)},)")
    shape = (len(x), len(weight))
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; this call needs {shape}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; this call needs {shape}")
