# mypy: disable-error-code="no-untyped-def"
"""Root-mean-square normalisation on the GPU: one program a row, the row in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from headrace.ops import dispatch
from headrace.ops.norm import check


@triton.jit
def normalize(x, weight, hidden, eps):
    """x / sqrt(mean(x ** 2) + eps) * weight, for the [BLOCK] float32 of a row, 0 from hidden on."""
    return x * tl.rsqrt(tl.sum(x * x) / hidden + eps) * weight


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_tokens, hidden]
    weight_ptr,  # [hidden]
    rows_ptr,  # [num_rows] int64, or None
    out_ptr,  # [num_tokens or num_rows, hidden]
    hidden,
    eps,
    LET_NEXT_START: tl.constexpr,  # sm_90: a kernel launched for it need not await the end
    BLOCK: tl.constexpr,
):
    """out = x / sqrt(mean(x ** 2) + eps) * weight, of all rows of x or of some."""
    if LET_NEXT_START:
        gdc_launch_dependents()
    out_row = tl.program_id(0).to(tl.int64)
    row = out_row if rows_ptr is None else tl.load(rows_ptr + out_row)
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    x = tl.load(x_ptr + row * hidden + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    out = normalize(x, weight, hidden, eps)
    tl.store(out_ptr + out_row * hidden + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor,  # [num_tokens or num_rows, hidden]; may be x where rows is None
    rows: Tensor | None = None,  # [num_rows] int64
) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight of x = x[rows], in float32, rounded once.

    Raises ValueError for shapes that do not fit and for tensors that are not contiguous.
    """
    check(x, weight, out, rows)
    num_rows, hidden = out.shape
    if num_rows:
        rms_norm_kernel[(num_rows,)](
            x, weight, rows, out, hidden, eps,
            LET_NEXT_START=dispatch.is_hopper(x),
            BLOCK=triton.next_power_of_2(hidden), num_warps=8,
        )  # fmt: skip
    return out
