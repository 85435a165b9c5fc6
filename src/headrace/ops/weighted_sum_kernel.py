# mypy: disable-error-code="no-untyped-def"
"""The end of a MoE layer on the GPU: the sum over a token's slots, and the norm that reads it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops import dispatch
from headrace.ops.norm import NextNorm
from headrace.ops.norm_kernel import normalize


@triton.jit(do_not_specialize=["first_expert", "num_local"])
def weighted_sum_kernel(
    y_ptr,  # [num_tokens * TOP_K, hidden], already times the routing weights
    expert_ids_ptr,  # [num_tokens, TOP_K] int32; None: all experts are held here
    residual_ptr,  # [num_tokens, hidden] or None
    out_ptr,  # [num_tokens, hidden]
    norm_weight_ptr,  # [hidden], or None
    normed_ptr,  # [num_tokens, hidden], or None
    hidden,
    eps,
    first_expert,
    num_local,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,  # columns; with a norm, all
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before has ended, and lets the next
):
    """out[t] = residual[t] + sum_k y[t, k], k rising, without the slots of experts not held here.

    normed[t] = out[t] / sqrt(mean(out[t] ** 2) + eps) * norm_weight.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    place = token * hidden + column
    if norm_weight_ptr is not None:
        weight = tl.load(norm_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        held = mask
        if expert_ids_ptr is not None:
            local = tl.load(expert_ids_ptr + token * TOP_K + k) - first_expert
            held = mask & (local >= 0) & (local < num_local)
        y = tl.load(y_ptr + (token * TOP_K + k) * hidden + column, mask=held, other=0.0)
        total += y.to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=mask)
    if norm_weight_ptr is not None:
        normed = normalize(out.to(tl.float32), weight, hidden, eps)
        tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=mask)


def weighted_sum(
    y: Tensor,  # [num_tokens * top_k, hidden]
    expert_ids: Tensor,  # [num_tokens, top_k] int32
    local: range | None,  # experts held here; None: all, and no id is read
    residual: Tensor | None,  # [num_tokens, hidden]
    out: Tensor,  # [num_tokens, hidden]; may be residual
    next_norm: NextNorm | None = None,
) -> Tensor:
    """out[t] = residual[t] + sum_k y[t, k], in float32 and in the order of k; then next_norm."""
    num_tokens, hidden = out.shape
    weight, eps, normed = None, 0.0, None
    if next_norm is not None:
        weight, eps, normed = next_norm.weight, next_norm.eps, next_norm.out
    block = 1024 if weight is None else triton.next_power_of_2(hidden)
    if num_tokens:
        early = dispatch.is_hopper(out)
        weighted_sum_kernel[(num_tokens, triton.cdiv(hidden, block))](
            y, None if local is None else expert_ids, residual, out, weight, normed, hidden, eps,
            local.start if local else 0, len(local or ()), TOP_K=expert_ids.shape[1], BLOCK=block,
            EARLY=early, num_warps=4 if weight is None else 8, launch_pdl=early,
        )  # fmt: skip
    return out
