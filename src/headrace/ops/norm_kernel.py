# mypy: disable-error-code="no-untyped-def"
"""Root-mean-square normalisation on the GPU: one program a row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_tokens, hidden]
    weight_ptr,  # [hidden]
    out_ptr,  # [num_tokens, hidden]
    hidden,
    eps,
    LET_NEXT_START: tl.constexpr,  # sm_90: a kernel launched for it need not await the end
    BLOCK: tl.constexpr,
):
    """out = x / sqrt(mean(x ** 2) + eps) * weight."""
    if LET_NEXT_START:
        gdc_launch_dependents()
    start = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / hidden + eps)
    tl.store(out_ptr + start + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor,  # [num_tokens, hidden]; may be x
) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once.

    Raises ValueError for shapes that do not fit and for tensors that are not contiguous.
    """
    _check(x, weight, out)
    num_tokens, hidden = x.shape
    if num_tokens:
        rms_norm_kernel[(num_tokens,)](
            x, weight, out, hidden, eps,
            LET_NEXT_START=x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0),
            BLOCK=triton.next_power_of_2(hidden), num_warps=8,
        )  # fmt: skip
    return out


def _check(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, strides {x.stride()}; pass contiguous "
            "[num_tokens, hidden]"
        )
    if tuple(weight.shape) != (x.shape[1],) or not weight.is_contiguous():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x needs ({x.shape[1]},)")
    if out.shape != x.shape or not out.is_contiguous():
        raise ValueError(
            f"out has shape {tuple(out.shape)}, strides {out.stride()}; pass contiguous "
            f"{tuple(x.shape)}"
        )
