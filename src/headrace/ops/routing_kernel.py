# mypy: disable-error-code="no-untyped-def"
"""Routing on the GPU: norm, router, top-k and the sort by expert, in one launch for few tokens.

A token's logits are partial sums over fixed slices of the hidden size, added in a fixed order, so
they do not depend on the other tokens. Each slice of 16 tokens has a program of its own, and the
last one to finish adds them up. Up to 128 tokens all is one launch; beyond, the norm has one before
it (14 us at 512 tokens on an H100, 32 within the router), and the end of the sort one after it.
`routing_cuda` has a faster kernel for few tokens, with the same bits; `route` asks it first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops import dispatch, routing_cuda
from headrace.ops.arena import fresh
from headrace.ops.arrival_kernel import arrive
from headrace.ops.checks import check_gpu_dtype, check_rows, check_tensor
from headrace.ops.lora import MoELora, router_tensors
from headrace.ops.lora_kernel import adapters_of_rows, add_low_rank_at_once
from headrace.ops.prefetch_kernel import prefetch_lines
from headrace.ops.routing import (
    BLOCK_T,
    GROUP_CHUNKS,
    SLICE_K,
    RoutingBuffers,
    padded_experts,
    routing_buffers,
    routing_counters,
)
from headrace.ops.sort_kernel import check_sort, place, place_slots, write_blocks

NORM_WARPS = 16  # wherever rows are normed: a row's sum of squares must have one order
NORM_ROWS = 4  # rows of a program of norm_kernel
WEIGHT_ONE = tl.constexpr(float(2**40))


def allocate(
    num_tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    block_m: int,
    dtype: torch.dtype,
    device: torch.device | str,
    num_local: int | None = None,
) -> RoutingBuffers:
    """Buffers of their own for one problem."""
    counters = routing_counters(num_tokens, device)
    return routing_buffers(
        fresh(device), counters, num_tokens, hidden, num_experts, top_k, block_m, dtype, num_local
    )


@triton.jit
def _load_rows(x_ptr, residual_ptr, token, num_tokens, column, HIDDEN: tl.constexpr):
    """x + residual of some columns, in x's dtype."""
    place = token[:, None].to(tl.int64) * HIDDEN + column[None, :]
    mask = (token < num_tokens)[:, None] & (column < HIDDEN)[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return x


@triton.jit
def _inverse_rms(
    x,  # [ROWS, PADDED_HIDDEN]
    eps,
    HIDDEN: tl.constexpr,
):
    """1 / sqrt(mean(x ** 2) + eps) of each row.

    The layout must not depend on how many tokens there are, for it orders a row's sum: so ROWS is
    less than BLOCK_T only where one row takes all threads. The square of a bfloat16 is exact in
    float32. routing_cuda.cu rounds as this does.
    """
    x = x.to(tl.float32)
    return tl.rsqrt(tl.fma(tl.sum(x * x, 1), 1.0 / HIDDEN, eps))


@triton.jit
def _store_normed(
    x,  # [BLOCK_T, SLICE_K], the sum already rounded
    norm,  # [SLICE_K] float32
    scale,  # [BLOCK_T] float32
    summed_ptr,
    normed_ptr,
    token,
    num_tokens,
    column,
    HIDDEN: tl.constexpr,
    STORE_SUM: tl.constexpr,
):
    """Write and return x * scale * norm, rounded; write x too if it is a sum."""
    place = token[:, None].to(tl.int64) * HIDDEN + column[None, :]
    mask = (token < num_tokens)[:, None] & (column < HIDDEN)[None, :]
    if STORE_SUM:
        tl.store(summed_ptr + place, x, mask=mask)
    normed = (x.to(tl.float32) * scale[:, None] * norm[None, :]).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + place, normed, mask=mask)
    return normed


@triton.jit
def _load_weight(
    weight_ptr, column, num_experts, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr
):  # [EXPERTS, columns]
    expert = tl.arange(0, EXPERTS)
    mask = (expert < num_experts)[:, None] & (column < HIDDEN)[None, :]
    return tl.load(weight_ptr + expert[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)


@triton.jit
def _prefetch_weight(
    weight_ptr,
    first_column,
    num_experts,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLICE_K: tl.constexpr,
):
    """Ask for a slice of the weight."""
    expert = tl.minimum(tl.arange(0, EXPERTS), num_experts - 1)
    column = tl.minimum(first_column + tl.arange(0, SLICE_K // 64) * 64, HIDDEN - 1)
    prefetch_lines(weight_ptr + expert[:, None] * HIDDEN + column[None, :])


@triton.jit
def _top_k(
    logits,  # [BLOCK_T, EXPERTS] float32
    num_experts,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The place of each expert among its token's TOP_K (-1: not chosen), and its weight.

    Ties go to the lower expert. The weights are a softmax over the chosen, or over all experts.
    """
    expert = tl.arange(0, EXPERTS)[None, :]
    # whatever the logits hold (a NaN too), every token gets TOP_K different experts
    left = tl.where(expert < num_experts, tl.maximum(logits, -3.0e38), float("-inf"))
    largest = tl.max(left, 1)
    powers = tl.exp(left - largest[:, None])
    chosen_as = tl.full([BLOCK_T, EXPERTS], -1, tl.int32)
    for k in tl.static_range(TOP_K):
        chosen = expert == tl.argmax(left, 1)[:, None]
        chosen_as = tl.where(chosen, k, chosen_as)
        left = tl.where(chosen, float("-inf"), left)
    counted = tl.where(chosen_as >= 0, powers, 0.0) if RENORMALIZE else powers
    # added as integers: floats would add up in an order that depends on where the logits come from
    total = tl.sum((counted * WEIGHT_ONE).to(tl.int64), 1).to(tl.float32) / WEIGHT_ONE
    return chosen_as, powers / total[:, None]


@triton.jit
def _choose(
    logits,  # [BLOCK_T, EXPERTS] float32
    chunk,
    num_tokens,
    num_experts,
    ids_ptr,
    weights_ptr,
    counters_ptr,
    ranks_ptr,
    histograms_ptr,
    slots_ptr,
    blocks_ptr,
    num_blocks,
    first_expert,
    num_local,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SORT_ALL: tl.constexpr,  # the last chunk to come here sorts the slots of all
    ONE_CHUNK: tl.constexpr,  # there are no others
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,  # with SORT_ALL: all chunks
    SLOTS: tl.constexpr,  # with SORT_ALL: all slots, padded
):
    """Top-k of a chunk of tokens, and its part of the sort."""
    token = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    chosen_as, weights = _top_k(logits, num_experts, TOP_K, RENORMALIZE, BLOCK_T, EXPERTS)
    chosen = (chosen_as >= 0) & (token < num_tokens)[:, None]
    slot = token[:, None] * TOP_K + chosen_as
    experts = tl.broadcast_to(expert[None, :], (BLOCK_T, EXPERTS))
    tl.store(ids_ptr + slot, experts, mask=chosen)
    tl.store(weights_ptr + slot, weights, mask=chosen)
    held = chosen & ((expert >= first_expert) & (expert < first_expert + num_local))[None, :]
    # a token has an expert once: the slots before one are those of earlier tokens
    rank = tl.cumsum(held.to(tl.int32), 0) - 1
    counts = tl.sum(held.to(tl.int32), 0)
    if ONE_CHUNK:
        first_row = tl.cumsum(counts, 0) - counts
        tl.store(slots_ptr + first_row[None, :] + rank, slot, mask=held)
        write_blocks(counts, blocks_ptr, num_blocks, first_expert, EXPERTS, BLOCK_M)
    else:
        tl.store(ranks_ptr + slot, rank, mask=held)
        tl.store(histograms_ptr + chunk * EXPERTS + expert, counts)
        if SORT_ALL:  # noqa: SIM102 (Triton would evaluate both sides of an `and`)
            if arrive(counters_ptr, tl.cdiv(num_tokens, BLOCK_T)):
                place_slots(
                    ids_ptr, ranks_ptr, histograms_ptr, slots_ptr, blocks_ptr, 0, num_tokens,
                    num_blocks, first_expert, num_local,
                    TOP_K, EXPERTS, BLOCK_M, BLOCK_T, CHUNKS, SLOTS, True,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def norm_kernel(
    x_ptr,  # [num_tokens, HIDDEN]
    residual_ptr,  # [num_tokens, HIDDEN] or None
    norm_ptr,  # [HIDDEN]
    summed_ptr,
    normed_ptr,
    num_tokens,
    eps,
    HIDDEN: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """normed = rms_norm(x + residual), with the bits that router_kernel gives it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_HIDDEN)
    norm = tl.load(norm_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    x = _load_rows(x_ptr, residual_ptr, row, num_tokens, column, HIDDEN)
    scale = _inverse_rms(x, eps, HIDDEN)
    ADDED: tl.constexpr = residual_ptr is not None
    _store_normed(x, norm, scale, summed_ptr, normed_ptr, row, num_tokens, column, HIDDEN, ADDED)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "first_expert", "num_local"])
def router_kernel(
    x_ptr,  # [num_tokens, HIDDEN]
    residual_ptr,  # [num_tokens, HIDDEN] or None
    norm_ptr,  # [HIDDEN]; None: x is normed
    weight_ptr,  # [num_experts, HIDDEN]
    bias_ptr,  # [num_experts] or None
    summed_ptr,
    normed_ptr,
    partials_ptr,  # [slices, num_tokens, EXPERTS] float32
    counters_ptr,
    ids_ptr,
    weights_ptr,
    ranks_ptr,
    histograms_ptr,
    slots_ptr,
    blocks_ptr,
    slot_of_token_ptr,  # [num_tokens] int32: the adapter of each token; None: no adapters
    memory_ptr,
    a_ptr,  # [1, adapters] int64, and so the next
    b_ptr,
    rank_ptr,  # [1, adapters] int32
    scale_ptr,  # [1, adapters] float32
    num_tokens,
    num_experts,
    num_blocks,
    first_expert,
    num_local,
    eps,
    TOP_K: tl.constexpr,  # 0: write the logits to weights_ptr and stop
    RENORMALIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,  # of BLOCK_T tokens, at most so many exist
    SLICE_K: tl.constexpr,
    SORT_ALL: tl.constexpr,  # else place_kernel ends the sort
    ONE_CHUNK: tl.constexpr,  # BLOCK_T tokens or fewer in all
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,  # with SORT_ALL: all chunks of BLOCK_T tokens
    SLOTS: tl.constexpr,  # with SORT_ALL: all slots, padded
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """normed = rms_norm(x + residual); logits = normed W^T + b; then top-k, and the sort's part.

    Adapters add scale (normed A^T) B to the logits.
    """
    SLICES: tl.constexpr = (HIDDEN + SLICE_K - 1) // SLICE_K
    ADDED: tl.constexpr = residual_ptr is not None
    # the experts are the tall side of the product: 64 rows, as Hopper's instruction wants them
    TALL: tl.constexpr = max(EXPERTS, 64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    row = chunk * BLOCK_T + tl.arange(0, ROWS)
    any_column = tl.arange(0, PADDED_HIDDEN)
    expert = tl.arange(0, EXPERTS)
    in_tokens = (token < num_tokens)[:, None]
    slice_k = tl.program_id(0)
    column = slice_k * SLICE_K + tl.arange(0, SLICE_K)
    if EARLY:
        _prefetch_weight(weight_ptr, slice_k * SLICE_K, num_experts, HIDDEN, EXPERTS, SLICE_K)
        gdc_wait()
        gdc_launch_dependents()
    # All loads before anything waits for one. ptxas would move the weight's first, and the
    # rest behind its stores to shared memory; it moves nothing over a barrier.
    if norm_ptr is not None:
        whole = _load_rows(x_ptr, residual_ptr, row, num_tokens, any_column, HIDDEN)
        norm = tl.load(norm_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    x = _load_rows(x_ptr, residual_ptr, token, num_tokens, column, HIDDEN)
    tl.debug_barrier()
    w = _load_weight(weight_ptr, column, num_experts, HIDDEN, TALL)
    if norm_ptr is None:
        normed = x
    else:
        scale = _inverse_rms(whole, eps, HIDDEN)
        if ROWS < BLOCK_T:  # row t gets that of t % ROWS: there are no rows from ROWS on
            scale = tl.broadcast_to(scale[None, :], (BLOCK_T // ROWS, ROWS)).reshape(BLOCK_T)
        normed = _store_normed(
            x, norm, scale, summed_ptr, normed_ptr, token, num_tokens, column, HIDDEN, ADDED
        )
    acc = tl.dot(w, tl.trans(normed), input_precision="ieee")
    slice_size = num_tokens * EXPERTS
    tall = tl.arange(0, TALL)[:, None]
    acc_ptrs = partials_ptr + slice_k * slice_size + token[None, :] * EXPERTS + tall
    tl.store(acc_ptrs, acc, mask=(token < num_tokens)[None, :] & (tall < EXPERTS))
    if arrive(counters_ptr + 1 + chunk, SLICES):
        partial_ptrs = partials_ptr + token[:, None] * EXPERTS + expert[None, :]
        logits = tl.zeros([BLOCK_T, EXPERTS], tl.float32)
        for s in tl.static_range(SLICES):
            logits += tl.load(
                partial_ptrs + s * slice_size, mask=in_tokens, other=0.0, cache_modifier=".cg"
            )
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert, mask=expert < num_experts, other=0.0)
            logits += bias.to(tl.float32)[None, :]
        if slot_of_token_ptr is not None:
            adapter = adapters_of_rows(slot_of_token_ptr, token, token < num_tokens)
            logits = add_low_rank_at_once(
                logits, adapter, token, expert, normed_ptr, HIDDEN, num_experts, memory_ptr, a_ptr,
                b_ptr, rank_ptr, scale_ptr, 64, 256,
            )  # fmt: skip
        if TOP_K == 0:
            out_ptrs = weights_ptr + token[:, None] * num_experts + expert[None, :]
            tl.store(out_ptrs, logits, mask=in_tokens & (expert < num_experts)[None, :])
        else:
            _choose(
                logits, chunk, num_tokens, num_experts, ids_ptr, weights_ptr, counters_ptr,
                ranks_ptr, histograms_ptr, slots_ptr, blocks_ptr, num_blocks, first_expert,
                num_local, TOP_K, RENORMALIZE, EXPERTS, BLOCK_T, SORT_ALL, ONE_CHUNK, BLOCK_M,
                CHUNKS, SLOTS,
            )  # fmt: skip


def route(
    x: Tensor,  # [num_tokens, hidden]
    residual: Tensor | None,  # [num_tokens, hidden]
    norm_weight: Tensor,  # [hidden]
    eps: float,
    router_weight: Tensor,  # [num_experts, hidden]
    router_bias: Tensor | None,  # [num_experts]
    buffers: RoutingBuffers,
    block_m: int,  # of the grouped matmuls that follow
    renormalize: bool = True,
    local: range | None = None,
    lora: MoELora | None = None,
) -> Tensor:
    """Fill `buffers`: normed, expert_ids, expert_weights and sorted. Returns x + residual.

    With renormalize the weights are a softmax over the chosen experts, else over all of them.
    `local` are the experts held here: slots of others get no block. Adapters of the router change
    the logits; a row without one gets the bits that it has where nobody has one.
    """
    _check(x, residual, norm_weight, router_weight, router_bias, buffers)
    local = local or range(len(router_weight))
    check_sort(buffers, local, block_m)
    if len(x) == 0:
        return x
    if routing_cuda.takes(x, norm_weight, router_weight, buffers, lora):
        routing_cuda.launch(
            x, residual, norm_weight, eps, router_weight, router_bias, buffers, block_m,
            renormalize, local, lora,
        )  # fmt: skip
        return x if residual is None else buffers.summed
    _launch_router(
        x, residual, norm_weight, eps, router_weight, router_bias, buffers,
        buffers.expert_weights, buffers.expert_ids.shape[1], renormalize, block_m, local, lora,
    )  # fmt: skip
    if not _is_few(len(x)):
        place(buffers.expert_ids, local, buffers, block_m)
    return x if residual is None else buffers.summed


def router_gemm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [num_experts, hidden]
    bias: Tensor | None,  # [num_experts]
    buffers: RoutingBuffers,
    out: Tensor,  # [num_tokens, num_experts] float32
) -> Tensor:
    """out = x W^T + b; a row has the same bits whatever the other rows."""
    _check(x, None, None, weight, bias, buffers)
    check_tensor("out", out, (len(x), len(weight)), torch.float32)
    if len(x):
        _launch_router(x, None, None, 0.0, weight, bias, buffers, out)
    return out


def _launch_router(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    buffers: RoutingBuffers,
    out: Tensor,  # logits, or with top_k weights
    top_k: int = 0,
    renormalize: bool = True,
    block_m: int = 16,
    local: range = range(0),
    lora: MoELora | None = None,
) -> None:
    num_tokens, hidden = x.shape
    few, early, experts = _is_few(num_tokens), dispatch.is_hopper(x), padded_experts(len(weight))
    if norm_weight is not None and not few:
        _launch_norm(x, residual, norm_weight, eps, buffers)
        x, residual, norm_weight = buffers.normed, None, None
    router_kernel[(triton.cdiv(hidden, SLICE_K), triton.cdiv(num_tokens, BLOCK_T))](
        x, residual, norm_weight, weight, bias, buffers.summed, buffers.normed, buffers.partials,
        buffers.counters, buffers.expert_ids, out, buffers.ranks, buffers.histograms,
        buffers.sorted.slots, buffers.sorted.blocks, *router_tensors(lora), num_tokens,
        len(weight), len(buffers.sorted.blocks), local.start, len(local), eps,
        TOP_K=top_k, RENORMALIZE=renormalize, HIDDEN=hidden,
        PADDED_HIDDEN=triton.next_power_of_2(hidden), EXPERTS=experts, BLOCK_T=BLOCK_T,
        ROWS=_rows_at_once(num_tokens, hidden), SLICE_K=SLICE_K, BLOCK_M=block_m,
        SORT_ALL=few, ONE_CHUNK=num_tokens <= BLOCK_T and top_k > 0, CHUNKS=GROUP_CHUNKS,
        SLOTS=triton.next_power_of_2(GROUP_CHUNKS * BLOCK_T * max(top_k, 1)), EARLY=early,
        num_warps=NORM_WARPS if few else 4 if experts <= 64 else 8, num_stages=2, launch_pdl=early,
    )  # fmt: skip


def _launch_norm(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, buffers: RoutingBuffers
) -> None:
    num_tokens, hidden = x.shape
    rows, early = _rows_at_once(NORM_ROWS, hidden), dispatch.is_hopper(x)
    norm_kernel[(triton.cdiv(num_tokens, rows),)](
        x, residual, norm_weight, buffers.summed, buffers.normed, num_tokens, eps, HIDDEN=hidden,
        PADDED_HIDDEN=triton.next_power_of_2(hidden), ROWS=rows, EARLY=early,
        num_warps=NORM_WARPS, launch_pdl=early,
    )  # fmt: skip


def _rows_at_once(num_rows: int, hidden: int) -> int:
    """Rows that a program norms: BLOCK_T unless fewer leave the layout as it is."""
    threads, values = NORM_WARPS * 32, 8  # that each one loads at once
    if triton.next_power_of_2(hidden) < threads * values:
        return BLOCK_T
    return min(triton.next_power_of_2(num_rows), BLOCK_T)


def _is_few(num_tokens: int) -> bool:
    """One launch does all."""
    return num_tokens <= BLOCK_T * GROUP_CHUNKS


def _check(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    buffers: RoutingBuffers,
) -> None:
    check_rows(x)
    check_gpu_dtype(x)
    (num_tokens, hidden), num_experts = x.shape, weight.shape[0]
    check_tensor("router weight", weight, (num_experts, hidden), x.dtype)
    if bias is not None:
        check_tensor("router bias", bias, (num_experts,), x.dtype)
    if residual is not None:
        check_tensor("residual", residual, (num_tokens, hidden), x.dtype)
        check_tensor("buffers.summed", buffers.summed, (num_tokens, hidden), x.dtype)
    if norm_weight is not None:
        check_tensor("norm weight", norm_weight, (hidden,), x.dtype)
        check_tensor("buffers.normed", buffers.normed, (num_tokens, hidden), x.dtype)
    if buffers.expert_ids.shape[1] > num_experts:
        raise ValueError(
            f"buffers are for the {buffers.expert_ids.shape[1]} best experts; there are "
            f"{num_experts}"
        )
