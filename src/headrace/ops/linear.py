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
) -> Tensor:
    """y = x W^T + b + residual, summed in float32 in this order and rounded once.

    Returns out, or a new tensor of x's dtype. A row of y has the same bits whatever the other
    rows, and however many: see _ROWS_TOGETHER and `linear_kernel`. Raises ValueError for shapes
    and dtypes that do not fit.
    """
    if dispatch.takes_kernel(x):
        from headrace.ops import linear_kernel

        if out is None:
            out = x.new_empty(len(x), len(weight))
        return linear_kernel.linear(x, weight, bias, residual, out)
    check(x, weight, bias, residual, out)
    num_tokens = x.shape[0]
    wide = F.pad(x.float(), (0, 0, 0, -num_tokens % _ROWS_TOGETHER))
    y = F.linear(wide, weight.float(), None if bias is None else bias.float())[:num_tokens]
    if residual is not None:
        y = y + residual
    return y.to(x.dtype) if out is None else out.copy_(y)


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> None:
    """Raise ValueError, naming the argument, where one does not fit the others."""
    x_shape, weight_shape = tuple(x.shape), tuple(weight.shape)
    if len(x_shape) != 2 or len(weight_shape) != 2 or x_shape[1] != weight_shape[1]:
        raise ValueError(
            f"x has shape {x_shape} and weight {weight_shape}; "
            "pass [num_tokens, in_features] and [out_features, in_features]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; convert one of them")
    if bias is not None and tuple(bias.shape) != weight_shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; weight needs {weight_shape[:1]}")
    shape = x_shape[0], weight_shape[0]
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this call needs {shape}")
