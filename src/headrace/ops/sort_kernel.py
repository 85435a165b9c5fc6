# mypy: disable-error-code="no-untyped-def"
"""Rows sorted by expert on the GPU, and the blocks of rows that a grouped matmul works on.

A stable counting sort. A chunk of 16 tokens counts its slots of each expert, and ranks each slot
among those of its expert (`rank_kernel` here, the router's own kernel otherwise). Then a slot's row
is: slots of lower experts + the same expert's in earlier chunks + its rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from headrace.ops import dispatch
from headrace.ops.checks import check_tensor
from headrace.ops.routing import (
    BLOCK_T,
    GROUP_CHUNKS,
    RoutingBuffers,
    SortedSlots,
    max_blocks,
)


@triton.jit
def write_blocks(
    counts,  # [EXPERTS] int32: rows of each expert
    blocks_ptr,
    num_blocks,
    first_expert,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Cut each expert's rows into blocks of BLOCK_M; the blocks left over get expert -1."""
    expert = tl.arange(0, EXPERTS)
    first_row = tl.cumsum(counts, 0) - counts
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    end_block = tl.cumsum(blocks, 0)
    first_block = end_block - blocks
    for i in range(0, tl.max(blocks, 0)):
        row_ptrs = blocks_ptr + (first_block + i) * 4
        row = first_row + i * BLOCK_M
        tl.store(row_ptrs, expert - first_expert, mask=i < blocks)
        tl.store(row_ptrs + 1, row, mask=i < blocks)
        tl.store(row_ptrs + 2, tl.minimum(row + BLOCK_M, first_row + counts), mask=i < blocks)
        tl.store(row_ptrs + 3, 0, mask=i < blocks)
    for start in range(tl.max(end_block, 0), num_blocks, EXPERTS):
        tl.store(blocks_ptr + (start + expert) * 4, -1, mask=start + expert < num_blocks)


@triton.jit
def place_slots(
    ids_ptr,  # [num_tokens, TOP_K] int32
    ranks_ptr,  # [num_tokens, TOP_K] int32
    histograms_ptr,  # [num_chunks, EXPERTS] int32
    slots_ptr,
    blocks_ptr,
    group,
    num_tokens,
    num_blocks,
    first_expert,
    num_local,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNKS: tl.constexpr,  # of a group
    SLOTS: tl.constexpr,  # of a group, padded
    ONE_GROUP: tl.constexpr,  # there are no others
):
    """Write the rows of one group of chunks; the first group writes the blocks too."""
    expert = tl.arange(0, EXPERTS)
    num_chunks = tl.cdiv(num_tokens, BLOCK_T)
    chunk = group * CHUNKS + tl.arange(0, CHUNKS)
    own = tl.load(
        histograms_ptr + chunk[:, None] * EXPERTS + expert[None, :],
        mask=(chunk < num_chunks)[:, None],
        other=0,
        cache_modifier=".cg",
    )
    in_group = tl.arange(0, SLOTS)
    slot = group * CHUNKS * BLOCK_T * TOP_K + in_group
    mask = (in_group < CHUNKS * BLOCK_T * TOP_K) & (slot < num_tokens * TOP_K)
    expert_id = tl.load(ids_ptr + slot, mask=mask, other=-1, cache_modifier=".cg")
    rank = tl.load(ranks_ptr + slot, mask=mask, other=0, cache_modifier=".cg")
    counts = tl.sum(own, 0)
    before = tl.zeros([EXPERTS], tl.int32)
    if not ONE_GROUP:
        counts = tl.zeros([EXPERTS], tl.int32)
        CHUNKS_AT_ONCE: tl.constexpr = 8192 // EXPERTS
        for start in range(0, num_chunks, CHUNKS_AT_ONCE):
            any_chunk = start + tl.arange(0, CHUNKS_AT_ONCE)
            histogram = tl.load(
                histograms_ptr + any_chunk[:, None] * EXPERTS + expert[None, :],
                mask=(any_chunk < num_chunks)[:, None],
                other=0,
            )
            counts += tl.sum(histogram, 0)
            earlier = (any_chunk < group * CHUNKS)[:, None]
            before += tl.sum(tl.where(earlier, histogram, 0), 0)
    base = (tl.cumsum(counts, 0) - counts + before)[None, :] + tl.cumsum(own, 0) - own
    held = (expert_id >= first_expert) & (expert_id < first_expert + num_local)
    place = in_group // (BLOCK_T * TOP_K) * EXPERTS + expert_id
    row = tl.gather(base.reshape(CHUNKS * EXPERTS), tl.where(held, place, 0), 0) + rank
    tl.store(slots_ptr + row, slot, mask=held)
    if group == 0:
        write_blocks(counts, blocks_ptr, num_blocks, first_expert, EXPERTS, BLOCK_M)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "first_expert", "num_local"])
def place_kernel(
    ids_ptr,
    ranks_ptr,
    histograms_ptr,
    slots_ptr,
    blocks_ptr,
    num_tokens,
    num_blocks,
    first_expert,
    num_local,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """One group of chunks a program."""
    if EARLY:
        gdc_wait()
    place_slots(
        ids_ptr, ranks_ptr, histograms_ptr, slots_ptr, blocks_ptr, tl.program_id(0), num_tokens,
        num_blocks, first_expert, num_local, TOP_K, EXPERTS, BLOCK_M, BLOCK_T, CHUNKS, SLOTS, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots", "first_expert", "num_local"])
def rank_kernel(
    ids_ptr,
    ranks_ptr,
    histograms_ptr,
    num_slots,
    first_expert,
    num_local,
    CHUNK_SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,  # CHUNK_SLOTS padded
):
    """Rank the slots of one chunk by comparing each with each, and count them."""
    place = tl.arange(0, SLOTS)
    slot = tl.program_id(0) * CHUNK_SLOTS + place
    mask = (place < CHUNK_SLOTS) & (slot < num_slots)
    expert_id = tl.load(ids_ptr + slot, mask=mask, other=-1)
    held = (expert_id >= first_expert) & (expert_id < first_expert + num_local)
    expert_id = tl.where(held, expert_id, -1)
    same = expert_id[:, None] == expert_id[None, :]
    rank = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), 1)
    tl.store(ranks_ptr + slot, rank, mask=mask)
    expert = tl.arange(0, EXPERTS)
    counts = tl.sum((expert_id[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(histograms_ptr + tl.program_id(0) * EXPERTS + expert, counts)


def sort(
    expert_ids: Tensor,  # [num_tokens, top_k] int32; -1: nobody's
    local: range,  # experts held here
    buffers: RoutingBuffers,
    block_m: int,
) -> SortedSlots:
    """Sort the slots of given experts, those of one expert by slot, in two launches.

    Triton's debug mode (TRITON_DEBUG=1) looks at the ids too, and waits for the GPU to do so.
    """
    check_tensor("expert_ids", expert_ids, buffers.expert_ids.shape, torch.int32)
    check_sort(buffers, local, block_m)
    if triton.knobs.runtime.debug:
        check_ids(expert_ids, buffers.num_experts)
    num_tokens, top_k = expert_ids.shape
    if num_tokens:
        chunk_slots = BLOCK_T * top_k
        rank_kernel[(triton.cdiv(num_tokens, BLOCK_T),)](
            expert_ids, buffers.ranks, buffers.histograms, expert_ids.numel(), local.start,
            len(local), CHUNK_SLOTS=chunk_slots, EXPERTS=buffers.histograms.shape[1],
            SLOTS=triton.next_power_of_2(chunk_slots), num_warps=4,
        )  # fmt: skip
        place(expert_ids, local, buffers, block_m)
    return buffers.sorted


def place(
    expert_ids: Tensor,  # [num_tokens, top_k] int32
    local: range,
    buffers: RoutingBuffers,  # with ranks and histograms
    block_m: int,
) -> None:
    """Fill buffers.sorted from ranks and histograms."""
    num_tokens, top_k = expert_ids.shape
    early = dispatch.is_hopper(expert_ids)
    place_kernel[(triton.cdiv(num_tokens, BLOCK_T * GROUP_CHUNKS),)](
        expert_ids, buffers.ranks, buffers.histograms, buffers.sorted.slots, buffers.sorted.blocks,
        num_tokens, len(buffers.sorted.blocks), local.start, len(local), TOP_K=top_k,
        EXPERTS=buffers.histograms.shape[1], BLOCK_M=block_m, BLOCK_T=BLOCK_T, CHUNKS=GROUP_CHUNKS,
        SLOTS=triton.next_power_of_2(GROUP_CHUNKS * BLOCK_T * top_k), EARLY=early,
        num_warps=8, launch_pdl=early,
    )  # fmt: skip


def check_sort(buffers: RoutingBuffers, local: range, block_m: int) -> None:
    """Raise ValueError where buffers are too small for the rows of the experts held here."""
    num_experts, num_slots = buffers.num_experts, buffers.expert_ids.numel()
    if not 0 <= local.start < local.stop <= num_experts or local.step != 1:
        raise ValueError(f"local is {local}; pass a range within the {num_experts} experts")
    needed = max_blocks(num_slots, len(local), block_m)
    if len(buffers.sorted.blocks) < needed:
        raise ValueError(
            f"buffers have {len(buffers.sorted.blocks)} blocks; {num_slots} slots of {len(local)} "
            f"experts in blocks of {block_m} rows need {needed}"
        )
    num_chunks = triton.cdiv(len(buffers.expert_ids), BLOCK_T)
    if len(buffers.counters) < num_chunks + 1:
        raise ValueError(
            f"counters are for {(len(buffers.counters) - 1) * BLOCK_T} tokens; make them with "
            f"routing_counters({len(buffers.expert_ids)}, ...) or more"
        )


def check_ids(expert_ids: Tensor, num_experts: int) -> None:
    """Raise ValueError for an id that is neither an expert's nor -1."""
    wrong = expert_ids[(expert_ids < -1) | (expert_ids >= num_experts)]
    if wrong.numel():
        raise ValueError(
            f"expert_ids has {wrong[0].item()}; pass 0 to {num_experts - 1}, or -1 for nobody's"
        )
