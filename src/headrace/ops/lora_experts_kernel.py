# mypy: disable-error-code="no-untyped-def"
"""u = scale (x A^T) of few rows within the launch of experts that needs it.

The lowest ids of `grouped_matmul`'s grid are programs that shrink: each sums one slice of K for a
block of rows and some rows of A, and the last of a block to arrive adds the slices up. The others
multiply the experts' weight meanwhile, and wait for u before they multiply it with B. With two
launches, which did not overlap, a layer of one token took 55 us, not 47, of 8 tokens 159, not 141,
of 128 tokens 247, not 237 (bench/results/h100/lora_ways.csv).

Nobody waits for ever. Low ids start first and never wait (`headrace.ops.arrival_kernel`). They
count and the others wait on one condition: a row of the block has an adapter, whatever its rank.
And the sort has zeroed the count (`SortedSlots.blocks`), of which each of the two matmuls that
follow has its own half, so that neither depends on what the other did.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.ops.arrival_kernel import count_in, wait_for
from headrace.ops.lora_kernel import (
    NO_ADAPTER,
    NUM_SLICES,
    LowRank,
    adapters_of_rows,
    shrink_rows,
)

# On an H100. With 16 rows one token takes 45 to 48 us a layer, but x is read four times: 16 tokens
# take 196, not 190 (lora_ways.csv).
_ROWS = tl.constexpr(64)  # of A
_BLOCK_K = tl.constexpr(64)
_STAGES = tl.constexpr(4)
_SHARES = tl.constexpr(2)  # programs that share the adapters of a block of rows
_SLICES = tl.constexpr(NUM_SLICES)


def shrink_programs(low_rank: LowRank | None) -> int:
    """Programs of a block of rows that shrink; 0: none has to."""
    if low_rank is None or low_rank.sums is None:
        return 0
    rank_tiles = triton.cdiv(low_rank.sums.shape[3], _ROWS.value)
    return NUM_SLICES * _SHARES.value * rank_tiles


@triton.jit
def _count_unit(GATHER: tl.constexpr):
    """What one program adds to a block's count: the first matmul of a sort has its lower half."""
    return 1 if GATHER else 1 << 16


@triton.jit
def wait_for_shrink(blocks_ptr, block, adapter, PROGRAMS: tl.constexpr, GATHER: tl.constexpr):
    """Wait for u of a block, if one of its rows has an adapter."""
    if tl.min(adapter, 0) < NO_ADAPTER:
        # one more than programs: it comes when the slices are added up
        wait_for(blocks_ptr + block * 4 + 3, (PROGRAMS + 1) * _count_unit(GATHER))


@triton.jit
def shrink_block(
    x_ptr,  # [rows, in_features]
    slots_ptr,
    blocks_ptr,
    slot_of_token_ptr,
    u_ptr,  # [num_pairs, max_rank]
    sums_ptr,  # [_SLICES, num_pairs, max_rank] float32
    sums_stride,
    memory_ptr,
    a_ptr,  # [num_slots], and so the next two
    rank_ptr,
    scale_ptr,
    in_features,
    max_rank,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """sums[slice, pair, r] for one block of rows; the last program of the block to arrive fills u.

    Rows of u are filled up to max_rank, with zeros from the rank on.
    """
    RANK_TILES: tl.constexpr = PROGRAMS // (_SLICES * _SHARES)
    block = tl.program_id(0) // PROGRAMS
    place = tl.program_id(0) % PROGRAMS
    slice_k = place % _SLICES
    rank_tile = place // _SLICES % RANK_TILES
    share = place // (_SLICES * RANK_TILES)
    expert = tl.load(blocks_ptr + block * 4)
    row = tl.load(blocks_ptr + block * 4 + 1) + tl.arange(0, BLOCK_M)
    row_mask = (expert >= 0) & (row < tl.load(blocks_ptr + block * 4 + 2))
    pair = tl.load(slots_ptr + row, mask=row_mask, other=0)
    adapter = adapters_of_rows(slot_of_token_ptr, pair // TOP_K, row_mask)
    if tl.min(adapter, 0) < NO_ADAPTER:
        rank = tl.load(rank_ptr + adapter, mask=adapter < NO_ADAPTER, other=0)
        adapter = tl.where(rank > 0, adapter, NO_ADAPTER)
        source = pair // TOP_K if GATHER else row
        r = rank_tile * _ROWS + tl.arange(0, _ROWS)
        sums_row = slice_k * sums_stride + pair * max_rank
        shrink_rows(
            x_ptr + source[None, :].to(tl.int64) * in_features, adapter, expert,
            sums_ptr + sums_row[None, :] + r[:, None], memory_ptr, a_ptr, rank_ptr, scale_ptr,
            in_features, rank_tile, slice_k, share, 1, False, _SHARES, _ROWS, _BLOCK_K, _STAGES,
        )  # fmt: skip
        count_ptr = blocks_ptr + block * 4 + 3
        unit = _count_unit(GATHER)
        if count_in(count_ptr, unit) >= (PROGRAMS - 1) * unit:
            _add_slices(
                sums_ptr, sums_stride, u_ptr, pair, adapter, rank, scale_ptr, max_rank, RANK_TILES
            )
            count_in(count_ptr, unit)


@triton.jit
def _add_slices(
    sums_ptr,
    sums_stride,
    u_ptr,
    pair,  # [BLOCK_M]
    adapter,  # [BLOCK_M]
    rank,  # [BLOCK_M]
    scale_ptr,
    max_rank,
    RANK_TILES: tl.constexpr,
):
    """u[pair, r] = scale (sum of the slices in their order), rounded."""
    scale = tl.load(scale_ptr + adapter, mask=adapter < NO_ADAPTER, other=0.0)
    for rank_tile in range(RANK_TILES):
        r = tl.arange(0, _ROWS)[:, None] + rank_tile * _ROWS
        place = pair[None, :] * max_rank + r
        mask = r < rank[None, :]
        total = tl.load(sums_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
        for slice_k in tl.static_range(1, _SLICES):
            slice_ptrs = sums_ptr + slice_k * sums_stride + place
            total += tl.load(slice_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        used = (r < max_rank) & (adapter < NO_ADAPTER)[None, :]
        tl.store(u_ptr + place, (total * scale[None, :]).to(u_ptr.dtype.element_ty), mask=used)
