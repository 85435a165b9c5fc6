# mypy: disable-error-code="no-untyped-def"
"""Routing on the GPU: norm, router, top-k and the sort by expert, in two launches when M is small.

A token's logits are partial sums over fixed slices of the hidden size, added in a fixed order by
whichever program arrives last, so they do not depend on the other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.ops.routing import (
    BLOCK_T,
    SLICE_K,
    SORT_CHUNK,
    RoutingBuffers,
    SortedSlots,
    padded_experts,
    routing_buffers,
    routing_counters,
)


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

    def take(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    counters = routing_counters(num_tokens, device)
    return routing_buffers(
        take, counters, num_tokens, hidden, num_experts, top_k, block_m, dtype, num_local
    )


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_tokens, hidden]
    residual_ptr,
    weight_ptr,  # [hidden]
    summed_ptr,
    out_ptr,
    hidden,
    eps,
    ADD_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """summed = x + residual, rounded; out = summed / sqrt(mean(summed ** 2) + eps) * weight."""
    start = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if ADD_RESIDUAL:
        x += tl.load(residual_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + start + column, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / hidden + eps)
    tl.store(out_ptr + start + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _arrive(counter_ptr, total):
    """Count this program in, after all its writes; true for the last, which zeroes the counter."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _top_k(
    logits,  # [BLOCK_T, EXPERTS] float32, -inf where there is no expert
    token,
    num_tokens,
    num_experts,
    ids_ptr,
    weights_ptr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The TOP_K largest, ties to the lower expert; softmax over them, or over all experts."""
    expert = tl.arange(0, EXPERTS)[None, :]
    column = tl.arange(0, PADDED_K)[None, :]
    ids = tl.zeros([BLOCK_T, PADDED_K], tl.int32)
    powers = tl.zeros([BLOCK_T, PADDED_K], tl.float32)
    largest = tl.max(logits, 1)
    left = logits
    for k in tl.static_range(TOP_K):
        value = tl.max(left, 1)
        chosen = tl.min(tl.where(left == value[:, None], expert, EXPERTS), 1)
        chosen = tl.minimum(chosen, num_experts - 1)  # a NaN row must not leave the weights
        left = tl.where(expert == chosen[:, None], float("-inf"), left)
        ids = tl.where(column == k, chosen[:, None], ids)
        powers = tl.where(column == k, tl.exp(value - largest)[:, None], powers)
    total = tl.sum(powers if RENORMALIZE else tl.exp(logits - largest[:, None]), 1)
    place = token[:, None] * TOP_K + column
    mask = (token < num_tokens)[:, None] & (column < TOP_K)
    tl.store(ids_ptr + place, ids, mask=mask)
    tl.store(weights_ptr + place, powers / total[:, None], mask=mask)


@triton.jit
def _write_blocks(
    counts,  # [EXPERTS] int32
    blocks_ptr,
    num_blocks,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Cut each expert's rows into blocks of BLOCK_M; the blocks left over get expert -1."""
    expert = tl.arange(0, EXPERTS)[None, :]
    first_row = (tl.cumsum(counts, 0) - counts)[None, :]
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    end_block = tl.cumsum(blocks, 0)
    first_block = (end_block - blocks)[None, :]
    end_block = end_block[None, :]
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        mine = (first_block <= block[:, None]) & (block[:, None] < end_block)
        row = first_row + (block[:, None] - first_block) * BLOCK_M
        end = tl.minimum(row + BLOCK_M, first_row + counts[None, :])
        mask = block < num_blocks
        tl.store(blocks_ptr + block * 4, tl.sum(tl.where(mine, expert + 1, 0), 1) - 1, mask=mask)
        tl.store(blocks_ptr + block * 4 + 1, tl.sum(tl.where(mine, row, 0), 1), mask=mask)
        tl.store(blocks_ptr + block * 4 + 2, tl.sum(tl.where(mine, end, 0), 1), mask=mask)


@triton.jit
def _sorted_keys(
    ids_ptr, start, num_slots, first_expert, num_local, EXPERTS: tl.constexpr, SLOTS: tl.constexpr
):
    """Sort keys expert << 16 | place of SLOTS slots; experts not held here come last as EXPERTS."""
    place = tl.arange(0, SLOTS)
    ids = tl.load(
        ids_ptr + start + place, mask=start + place < num_slots, other=-1, cache_modifier=".cg"
    )
    local = ids - first_expert
    local = tl.where((ids >= 0) & (local >= 0) & (local < num_local), local, EXPERTS)
    return tl.sort((local << 16) | place)


@triton.jit
def _count(keys, EXPERTS: tl.constexpr):
    """Slots of each expert."""
    match = (keys >> 16)[:, None] == tl.arange(0, EXPERTS)[None, :]
    return tl.sum(match.to(tl.int32), 0)


@triton.jit
def _sort_in_one_program(
    ids_ptr,
    slots_ptr,
    blocks_ptr,
    num_slots,
    num_blocks,
    first_expert,
    num_local,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,
):
    keys = _sorted_keys(ids_ptr, 0, num_slots, first_expert, num_local, EXPERTS, SLOTS)
    row = tl.arange(0, SLOTS)
    tl.store(slots_ptr + row, keys & 0xFFFF, mask=row < num_slots)
    _write_blocks(_count(keys, EXPERTS), blocks_ptr, num_blocks, EXPERTS, BLOCK_M, 64)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "first_expert", "num_local"])
def router_kernel(
    x_ptr,  # [num_tokens, hidden]
    weight_ptr,  # [num_experts, hidden]
    bias_ptr,  # [num_experts]
    partials_ptr,  # [slices, num_tokens, EXPERTS] float32
    counters_ptr,
    ids_ptr,
    weights_ptr,
    slots_ptr,
    blocks_ptr,
    num_tokens,
    num_experts,
    hidden,
    num_blocks,
    first_expert,
    num_local,
    TOP_K: tl.constexpr,  # 0: write the logits to weights_ptr and stop
    PADDED_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SLICE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,  # 0: the sort is launched on its own
):
    """logits = x W^T + b for BLOCK_T tokens over one slice of K; the last slice does the rest."""
    token_block = tl.program_id(1)
    slice_k = tl.program_id(0)
    token = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    in_tokens = (token < num_tokens)[:, None]
    acc = tl.zeros([BLOCK_T, EXPERTS], tl.float32)
    for step in tl.static_range(SLICE_K // BLOCK_K):
        k = slice_k * SLICE_K + step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + token[:, None].to(tl.int64) * hidden + k[None, :]
        w_ptrs = weight_ptr + expert[None, :] * hidden + k[:, None]
        in_k = k < hidden
        x = tl.load(x_ptrs, mask=in_tokens & in_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_k[:, None] & (expert < num_experts)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    place = token[:, None] * EXPERTS + expert[None, :]
    slice_size = num_tokens * EXPERTS
    tl.store(partials_ptr + slice_k * slice_size + place, acc, mask=in_tokens)
    if _arrive(counters_ptr + 1 + token_block, SLICES):
        logits = tl.zeros([BLOCK_T, EXPERTS], tl.float32)
        for s in tl.static_range(SLICES):
            logits += tl.load(
                partials_ptr + s * slice_size + place,
                mask=in_tokens,
                other=0.0,
                cache_modifier=".cg",
            )
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert, mask=expert < num_experts, other=0.0)
            logits = logits + bias.to(tl.float32)[None, :]
        if TOP_K == 0:
            out_ptrs = weights_ptr + token[:, None] * num_experts + expert[None, :]
            tl.store(out_ptrs, logits, mask=in_tokens & (expert < num_experts)[None, :])
        else:
            logits = tl.where((expert < num_experts)[None, :], logits, float("-inf"))
            _top_k(
                logits, token, num_tokens, num_experts, ids_ptr, weights_ptr,
                TOP_K, PADDED_K, RENORMALIZE, BLOCK_T, EXPERTS,
            )  # fmt: skip
            if SLOTS > 0:  # noqa: SIM102 (Triton would evaluate both sides of an `and`)
                if _arrive(counters_ptr, tl.num_programs(1)):
                    _sort_in_one_program(
                        ids_ptr, slots_ptr, blocks_ptr, num_tokens * TOP_K, num_blocks,
                        first_expert, num_local, EXPERTS, BLOCK_M, SLOTS,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots", "first_expert", "num_local"])
def sort_count_kernel(
    ids_ptr,
    histograms_ptr,
    num_slots,
    first_expert,
    num_local,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Slots of each expert in one chunk."""
    chunk = tl.program_id(0)
    keys = _sorted_keys(ids_ptr, chunk * SLOTS, num_slots, first_expert, num_local, EXPERTS, SLOTS)
    expert = tl.arange(0, EXPERTS)
    tl.store(histograms_ptr + chunk * EXPERTS + expert, _count(keys, EXPERTS))


@triton.jit(
    do_not_specialize=["num_slots", "num_blocks", "num_chunks", "first_expert", "num_local"]
)
def sort_place_kernel(
    ids_ptr,
    histograms_ptr,
    slots_ptr,
    blocks_ptr,
    num_slots,
    num_blocks,
    num_chunks,
    first_expert,
    num_local,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Row of each slot = rows of lower experts + same expert in earlier chunks + rank in chunk."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    before = tl.zeros([EXPERTS], tl.int32)
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_chunks, CHUNKS):
        row = start + tl.arange(0, CHUNKS)
        histogram = tl.load(
            histograms_ptr + row[:, None] * EXPERTS + expert[None, :],
            mask=(row < num_chunks)[:, None],
            other=0,
        )
        counts += tl.sum(histogram, 0)
        before += tl.sum(tl.where((row < chunk)[:, None], histogram, 0), 0)
    keys = _sorted_keys(ids_ptr, chunk * SLOTS, num_slots, first_expert, num_local, EXPERTS, SLOTS)
    mine = _count(keys, EXPERTS)
    # keys are sorted: rank in the chunk = place - slots of lower experts in the chunk
    base = tl.cumsum(counts, 0) - counts + before - (tl.cumsum(mine, 0) - mine)
    match = (keys >> 16)[:, None] == expert[None, :]
    row = tl.sum(tl.where(match, base[None, :], 0), 1) + tl.arange(0, SLOTS)
    slot = chunk * SLOTS + (keys & 0xFFFF)
    tl.store(slots_ptr + row, slot, mask=(keys >> 16) < EXPERTS)
    if chunk == 0:
        _write_blocks(counts, blocks_ptr, num_blocks, EXPERTS, BLOCK_M, 64)


def route(
    x: Tensor,  # [num_tokens, hidden]
    residual: Tensor | None,  # [num_tokens, hidden]
    norm_weight: Tensor,  # [hidden]
    eps: float,
    router_weight: Tensor,  # [num_experts, hidden]
    router_bias: Tensor | None,  # [num_experts]
    buffers: RoutingBuffers,
    block_m: int,
    renormalize: bool = True,
    local: range | None = None,
) -> Tensor:
    """Fill `buffers`: normed, expert_ids, expert_weights and sorted. Returns x + residual.

    With renormalize the weights are a softmax over the chosen experts, else over all of them.
    `local` are the experts held here: slots of others get no block.
    """
    num_tokens, hidden = x.shape
    if num_tokens == 0:
        return x
    summed = x if residual is None else buffers.summed
    rms_norm_kernel[(num_tokens,)](
        x, x if residual is None else residual, norm_weight, summed, buffers.normed, hidden, eps,
        ADD_RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(hidden), num_warps=8,
    )  # fmt: skip
    top_k = buffers.expert_ids.shape[1]
    num_slots = num_tokens * top_k
    fused = num_slots <= SORT_CHUNK
    local = local or range(len(router_weight))
    _launch_router(
        buffers.normed, router_weight, router_bias, buffers, top_k, renormalize, block_m, local,
        max(triton.next_power_of_2(num_slots), 16) if fused else 0,
    )  # fmt: skip
    if not fused:
        sort(buffers.expert_ids, local, buffers, block_m)
    return summed


def router_gemm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [num_experts, hidden]
    bias: Tensor | None,  # [num_experts]
    buffers: RoutingBuffers,
    out: Tensor,  # [num_tokens, num_experts] float32
) -> Tensor:
    """out = x W^T + b; a row has the same bits whatever the other rows."""
    if out.shape != (len(x), len(weight)) or out.dtype != torch.float32:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}; needs {(len(x), len(weight))} float32"
        )
    if len(x):
        everyone = range(len(weight))
        _launch_router(x, weight, bias, buffers, 0, True, 16, everyone, 0, out)
    return out


def sort(
    expert_ids: Tensor,  # [num_tokens, top_k] int32; -1: nobody's
    local: range,
    buffers: RoutingBuffers,
    block_m: int,
) -> SortedSlots:
    """Sort the slots by expert, those of one expert by token, in two launches."""
    num_slots = expert_ids.numel()
    if num_slots == 0:
        return buffers.sorted
    padded = buffers.histograms.shape[1]
    chunks = triton.cdiv(num_slots, SORT_CHUNK)
    sort_count_kernel[(chunks,)](
        expert_ids, buffers.histograms, num_slots, local.start, len(local),
        EXPERTS=padded, SLOTS=SORT_CHUNK, num_warps=8,
    )  # fmt: skip
    sort_place_kernel[(chunks,)](
        expert_ids, buffers.histograms, buffers.sorted.slots, buffers.sorted.blocks,
        num_slots, len(buffers.sorted.blocks), chunks, local.start, len(local),
        EXPERTS=padded, BLOCK_M=block_m, SLOTS=SORT_CHUNK, CHUNKS=16, num_warps=8,
    )  # fmt: skip
    return buffers.sorted


def _launch_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffers: RoutingBuffers,
    top_k: int,
    renormalize: bool,
    block_m: int,
    local: range,
    sort_slots: int,
    logits: Tensor | None = None,
) -> None:
    num_tokens, hidden = x.shape
    if weight.shape[1] != hidden:
        raise ValueError(f"router weight is {tuple(weight.shape)}; x is {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"router bias is {tuple(bias.shape)}; weight is {tuple(weight.shape)}")
    slices = triton.cdiv(hidden, SLICE_K)
    router_kernel[(slices, triton.cdiv(num_tokens, BLOCK_T))](
        x, weight, bias, buffers.partials, buffers.counters, buffers.expert_ids,
        buffers.expert_weights if logits is None else logits,
        buffers.sorted.slots, buffers.sorted.blocks, num_tokens, len(weight), hidden,
        len(buffers.sorted.blocks), local.start, len(local),
        TOP_K=top_k, PADDED_K=triton.next_power_of_2(max(top_k, 1)),
        RENORMALIZE=renormalize, EXPERTS=padded_experts(len(weight)),
        BLOCK_T=BLOCK_T, SLICE_K=SLICE_K, BLOCK_K=64, SLICES=slices, BLOCK_M=block_m,
        SLOTS=sort_slots, num_warps=4,
    )  # fmt: skip
