# mypy: disable-error-code="no-untyped-def"
"""Low-rank adapters on the GPU: x A^T in one launch, its product with B in the next.

The first is `shrink_kernel`, for dense layers and for experts. The second is, for experts, the last
step of the base matmul (`grouped_matmul` with a `LowRank`, by `add_low_rank` here), and for dense
layers `expand_kernel`. For few rows of experts the base matmul does both (`lora_experts_kernel`),
and the router's kernel always does (`add_low_rank_at_once`, up to 128 tokens `routing_cuda.cu`). A
program finds the adapters of its rows itself and takes each at its own rank, so that the grid, and
with it a captured CUDA graph, does not depend on who is in the batch.

One instruction kind and one order over K and over the rank, whatever the batch: rows of other
adapters count as zeros in a product, which leaves a sum as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops import dispatch
from headrace.ops.arena import Take
from headrace.ops.embedding_kernel import known_id
from headrace.ops.lora import LoraRows, LoraSite
from headrace.ops.prefetch_kernel import prefetch
from headrace.ops.routing import SortedSlots, max_blocks

NUM_SLICES = 4  # of K: each is summed on its own, then they are added in order
_SLICES = tl.constexpr(NUM_SLICES)
# Up to so many rows, each slice has a program of its own. At rank 64 q, k, v and output take 59 us
# so and 67 whole at 256 tokens, 71 both ways at 384, 83 and 77 at 512, 150 and 124 at 1024
# (bench/results/h100/lora_dense_slices.csv). Powers of 2: `reserve` asks for the memory of each.
FEW_TOKENS, FEW_PAIRS = 256, 1024
FEW_BLOCKS = 32  # up to so many blocks, the factors B of all fit into L2 beside other things
DENSE_BLOCK_N = 64
MOST_TILES = 264  # programs that share the columns of a block of rows: two an SM
NO_ADAPTER = tl.constexpr(1 << 30)  # above every slot: the smallest of a block's slots comes next


@dataclass(frozen=True)
class LowRank:
    """What adapters add beside a base matmul of experts: u = scale (x A^T), and where B is."""

    site: LoraSite
    memory: Tensor  # LoraWeights.memory
    slot_of_token: Tensor  # [num_tokens] int32, -1: none
    u: Tensor  # [1, 1, num_pairs, max_rank] in x's dtype
    sums: Tensor | None  # [NUM_SLICES, 1, num_pairs, max_rank] float32; None: u is filled already


def _whole_eights(max_rank: int) -> int:
    """The length of a row of parts, which are written and read in eights."""
    return -(-max_rank // 8) * 8


def low_rank_parts(take: Take, num_segments: int, num_rows: int, max_rank: int) -> Tensor:
    """The buffer of x A^T: the sums of slices of K, or for many rows u in the first part."""
    num_parts = NUM_SLICES if num_rows <= FEW_TOKENS else 1
    return take((num_parts, num_segments, num_rows, _whole_eights(max_rank)), torch.float32)


def pair_parts(take: Take, num_pairs: int, max_rank: int) -> Tensor:
    """The same for (token, expert) pairs: u in the first part; for few pairs, then the sums."""
    num_parts = 1 + NUM_SLICES if num_pairs <= FEW_PAIRS else 1
    return take((num_parts, 1, num_pairs, _whole_eights(max_rank)), torch.float32)


@triton.jit
def _block_of_experts(blocks_ptr, block):
    """(expert, first row, end row) of a block that the sort by expert has cut."""
    expert = tl.load(blocks_ptr + block * 4)
    return expert, tl.load(blocks_ptr + block * 4 + 1), tl.load(blocks_ptr + block * 4 + 2)


@triton.jit
def _block_of_adapters(starts_ptr, block, num_slots, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The same for rows sorted by adapter and cut here; expert -1: no block so high."""
    i = tl.arange(0, SLOTS)
    first = tl.load(starts_ptr + i, mask=i < num_slots, other=0)
    end = tl.load(starts_ptr + i + 1, mask=i < num_slots, other=0)
    end_block = tl.cumsum((end - first + BLOCK_M - 1) // BLOCK_M, 0)
    mine = tl.sum((end_block <= block).to(tl.int32), 0)
    is_mine = i == mine
    first_block = end_block - (end - first + BLOCK_M - 1) // BLOCK_M
    row = tl.sum(tl.where(is_mine, first + (block - first_block) * BLOCK_M, 0), 0)
    return tl.where(mine < num_slots, 0, -1), row, tl.sum(tl.where(is_mine, end, 0), 0)


@triton.jit
def adapters_of_rows(slot_of_token_ptr, token, mask):
    """Slot of each row's adapter, or NO_ADAPTER."""
    slot = tl.load(slot_of_token_ptr + token, mask=mask, other=-1)
    return tl.where(slot < 0, NO_ADAPTER, slot)


@triton.jit
def _adapters_with_rank(slot_of_token_ptr, token, mask, rank_ptr):
    """The same, NO_ADAPTER also for adapters that leave the segment alone."""
    adapter = adapters_of_rows(slot_of_token_ptr, token, mask)
    rank = tl.load(rank_ptr + adapter, mask=adapter < NO_ADAPTER, other=0)
    return tl.where(rank > 0, adapter, NO_ADAPTER)


@triton.jit
def _in_eights(rank):
    """How much of a row of parts is written and read, 16 bytes at a time: zeros after the rank."""
    return (rank + 7) // 8 * 8


@triton.jit
def _prefetch_rows(factor_ptr, first, rank, columns, ROWS: tl.constexpr):
    """Bring this part's share of a factor's ROWS rows from `first` on into L2, those below rank."""
    share = ROWS // tl.num_programs(2)
    first += tl.program_id(2) * share
    end = tl.minimum(first + share, rank)
    if first < end:
        num_bytes = (end - first) * columns * (factor_ptr.dtype.element_ty.primitive_bitwidth // 8)
        prefetch(factor_ptr + first * columns, num_bytes)


@triton.jit
def _width(segment, WIDTHS: tl.constexpr):
    """(columns before the segment, its own)."""
    begin, width = 0, 0
    for s in tl.static_range(len(WIDTHS)):
        begin += tl.where(s < segment, WIDTHS[s], 0)
        width += tl.where(s == segment, WIDTHS[s], 0)
    return begin, width


@triton.jit
def shrink_rows(
    x_ptrs,  # [1, BLOCK_M]: the rows of x
    adapter,  # [BLOCK_M], from _adapters_with_rank
    expert,
    out_ptrs,  # [BLOCK_R, BLOCK_M]
    memory_ptr,
    a_ptr,  # [num_slots] of the segment, and so the next two
    rank_ptr,
    scale_ptr,
    in_features,
    rank_tile,
    part,
    share,
    SLICES: tl.constexpr,  # of a part
    WHOLE: tl.constexpr,  # there is one part: times scale, and rounded
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,  # those of the kernel
):
    """out[r, row] = sum_k A[r, k] x[row, k] over the k of a part's slices, adapter by adapter."""
    BLOCK_R: tl.constexpr = out_ptrs.shape[0]
    BLOCK_M: tl.constexpr = out_ptrs.shape[1]
    slice_size = tl.cdiv(tl.cdiv(in_features, _SLICES), 256) * 256
    place = tl.arange(0, BLOCK_R)
    r = rank_tile * ROWS + place
    current = tl.min(adapter, 0)
    turn = 0
    while current < NO_ADAPTER:
        rank = tl.load(rank_ptr + current)
        if (turn % SHARES == share) & (rank_tile * ROWS < rank):
            before = expert.to(tl.int64) * rank  # rows of the experts before
            start = tl.multiple_of(tl.load(a_ptr + current), 128) + before * in_features
            a_ptrs = memory_ptr + start + r[:, None] * in_features
            mine = (adapter == current)[None, :]
            in_rank = ((place < ROWS) & (r < rank))[:, None]
            total = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
            for slice_k in range(part * SLICES, (part + 1) * SLICES):
                acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
                end_k = tl.minimum((slice_k + 1) * slice_size, in_features)
                for step in tl.range(slice_k * slice_size, end_k, BLOCK_K, num_stages=STAGES):
                    k = step + tl.arange(0, BLOCK_K)
                    in_k = k < end_k
                    a = tl.load(a_ptrs + k[None, :], mask=in_rank & in_k[None, :], other=0.0)
                    # past L1: of shrink_kernel no wait has made x visible if X_DONE
                    mask = mine & in_k[:, None]
                    x = tl.load(x_ptrs + k[:, None], mask=mask, other=0.0, cache_modifier=".cg")
                    acc = tl.dot(a, x, acc, input_precision="ieee")
                total += acc
            if WHOLE:
                total *= tl.load(scale_ptr + current)
            written = ((place < ROWS) & (r < _in_eights(rank)))[:, None]
            tl.store(out_ptrs, total.to(out_ptrs.dtype.element_ty), mask=mine & written)
        turn += 1
        adapter = tl.where(adapter == current, NO_ADAPTER, adapter)
        current = tl.min(adapter, 0)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def shrink_kernel(
    x_ptr,  # [rows, in_features]
    memory_ptr,
    a_ptr,  # [num_segments, num_slots] int64
    b_ptr,  # [num_segments, num_slots] int64
    rank_ptr,  # [num_segments, num_slots] int32
    scale_ptr,  # [num_segments, num_slots] float32
    parts_ptr,  # [num_parts, num_segments, num_rows, max_rank]
    order_ptr,  # [num_rows] int32: sorted rows
    work_ptr,  # blocks of experts, or starts of adapters
    slot_of_token_ptr,
    num_rows,
    num_slots,
    in_features,
    max_rank,
    WIDTHS: tl.constexpr,  # of the segments
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,  # x has one row per token, else one per sorted row
    EXPERTS: tl.constexpr,  # work_ptr holds blocks of experts
    SLOTS: tl.constexpr,  # num_slots, rounded up
    RANK_TILES: tl.constexpr,
    SLICES: tl.constexpr,  # of K that a program sums
    WHOLE: tl.constexpr,  # these are all: times scale, and rounded
    SHARES: tl.constexpr,  # programs that share the adapters of a block of rows
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,  # height of a tile of A
    ROWS: tl.constexpr,  # rows of A in it; the others are zeros, and nothing is read for them
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,  # bring B into L2
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
    SORT_DONE: tl.constexpr,  # the rows were sorted before that kernel began
    X_DONE: tl.constexpr,  # so was x written
):
    """parts[part, segment, row, r] = sum_k A[r, k] x[row, k] over the k of its slices."""
    block = tl.program_id(0) // SHARES
    share = tl.program_id(0) % SHARES
    segment = tl.program_id(1) // RANK_TILES
    rank_tile = tl.program_id(1) % RANK_TILES
    part = tl.program_id(2)
    # somewhere every program waits, for the next kernel waits for this one only
    if EARLY and not SORT_DONE:
        gdc_wait()
        gdc_launch_dependents()
    if EXPERTS:
        expert, first, end = _block_of_experts(work_ptr, block)
    else:
        expert, first, end = _block_of_adapters(work_ptr, block, num_slots, SLOTS, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    row_mask = (expert >= 0) & (row < end)
    pair = tl.load(order_ptr + row, mask=row_mask, other=0)
    a_ptr += segment * num_slots
    b_ptr += segment * num_slots
    rank_ptr += segment * num_slots
    scale_ptr += segment * num_slots
    adapter = _adapters_with_rank(slot_of_token_ptr, pair // TOP_K, row_mask, rank_ptr)
    r = rank_tile * ROWS + tl.arange(0, BLOCK_R)
    if EARLY and SORT_DONE:
        if not X_DONE:
            gdc_wait()
        gdc_launch_dependents()
    source = pair // TOP_K if GATHER else row
    x_ptrs = x_ptr + source[None, :].to(tl.int64) * in_features
    if PREFETCH:
        current = tl.min(adapter, 0)
        if current < NO_ADAPTER:  # the only one of the block
            rank = tl.load(rank_ptr + current)
            _, width = _width(segment, WIDTHS)
            begin = tl.load(b_ptr + current) + expert.to(tl.int64) * rank * width
            _prefetch_rows(memory_ptr + begin, rank_tile * ROWS, rank, width, ROWS)
    num_segments = tl.num_programs(1) // RANK_TILES
    out_row = (part * num_segments + segment).to(tl.int64) * num_rows + pair
    out_ptrs = parts_ptr + out_row[None, :] * max_rank + r[:, None]
    shrink_rows(
        x_ptrs, adapter, expert, out_ptrs, memory_ptr, a_ptr, rank_ptr, scale_ptr, in_features,
        rank_tile, part, share, SLICES, WHOLE, SHARES, ROWS, BLOCK_K,
    )  # fmt: skip
    if EARLY and X_DONE:
        gdc_wait()


@triton.jit
def add_low_rank(
    acc,  # [BLOCK_N, BLOCK_M] float32
    adapter,  # [BLOCK_M], from adapters_of_rows
    pair,  # [BLOCK_M]: rows of parts
    column,  # [BLOCK_N]: columns of B, in the order of acc's rows but for INTERLEAVED
    expert,
    parts_ptr,  # of the segment
    part_stride,
    max_rank,
    memory_ptr,
    b_ptr,  # [num_slots] of the segment
    rank_ptr,
    scale_ptr,
    width,
    NUM_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr = False,  # acc has columns 2i and 2i + 1 of each 16 in 8 and 8 rows
    SAME_LAUNCH: tl.constexpr = False,  # the one part is from shrink_block
):
    """acc[n, row] += sum_r B[r, n] u[row, r], u = scale * (sum of parts) rounded, or the one part.

    Adapter after adapter of the rows; the rows of the others count as zeros.
    """
    BLOCK_N: tl.constexpr = column.shape[0]
    CACHE: tl.constexpr = ".cg" if SAME_LAUNCH else ""
    parts_ptrs = parts_ptr + pair[None, :].to(tl.int64) * max_rank
    current = tl.min(adapter, 0)
    first_r = 0
    # one loop, for with another in it acc made ptxas let each product of the base matmul wait for
    # the one before, where it has 128 x 128 sums in 4 warps
    while current < NO_ADAPTER:
        rank = tl.load(rank_ptr + current)
        start = tl.multiple_of(tl.load(b_ptr + current), 128)
        b_ptrs = memory_ptr + start + expert.to(tl.int64) * rank * width + column[None, :]
        r = first_r + tl.arange(0, BLOCK_R)[:, None]
        b = tl.load(b_ptrs + r * width, mask=(r < rank) & (column < width)[None, :], other=0.0)
        mask = (adapter == current)[None, :] & (r < _in_eights(rank))
        u = tl.load(parts_ptrs + r, mask=mask, other=0.0, cache_modifier=CACHE)
        if NUM_PARTS > 1:
            for part in tl.static_range(1, NUM_PARTS):
                u += tl.load(parts_ptrs + part * part_stride + r, mask=mask, other=0.0)
            u = (u * tl.load(scale_ptr + current)).to(b.dtype)
        if INTERLEAVED:
            b = b.reshape(BLOCK_R, BLOCK_N // 16, 8, 2).permute(0, 1, 3, 2)
            b = b.reshape(BLOCK_R, BLOCK_N)
        acc = tl.dot(tl.trans(b), u, acc, input_precision="ieee")
        first_r += BLOCK_R
        is_done = first_r >= rank
        first_r = tl.where(is_done, 0, first_r)
        adapter = tl.where((adapter == current) & is_done, NO_ADAPTER, adapter)
        current = tl.min(adapter, 0)
    return acc


@triton.jit
def add_low_rank_at_once(
    y,  # [BLOCK_M, BLOCK_N] float32
    adapter,  # [BLOCK_M], from adapters_of_rows
    row,  # [BLOCK_M]: rows of x
    column,  # [BLOCK_N]: columns of B
    x_ptr,  # [rows, in_features]
    in_features,
    width,
    memory_ptr,
    a_ptr,  # [num_slots], and so the next three
    b_ptr,
    rank_ptr,
    scale_ptr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[row] += scale (x A^T) B, both halves here: for a site so narrow that one program has it."""
    x_ptrs = x_ptr + row[:, None].to(tl.int64) * in_features
    current = tl.min(adapter, 0)
    while current < NO_ADAPTER:
        rank = tl.load(rank_ptr + current)
        a_ptrs = memory_ptr + tl.multiple_of(tl.load(a_ptr + current), 128)
        b_ptrs = memory_ptr + tl.multiple_of(tl.load(b_ptr + current), 128)
        mine = (adapter == current)[:, None]
        for first_r in tl.range(0, rank, BLOCK_R, num_stages=1):
            r = first_r + tl.arange(0, BLOCK_R)
            u = tl.zeros([y.shape[0], BLOCK_R], tl.float32)
            for step in range(0, in_features, BLOCK_K):
                k = step + tl.arange(0, BLOCK_K)
                in_k = k < in_features
                x = tl.load(x_ptrs + k[None, :], mask=mine & in_k[None, :], other=0.0)
                mask = (r < rank)[None, :] & in_k[:, None]
                a = tl.load(a_ptrs + r[None, :] * in_features + k[:, None], mask=mask, other=0.0)
                u = tl.dot(x, a, u, input_precision="ieee")
            mask = (r < rank)[:, None] & (column < width)[None, :]
            b = tl.load(b_ptrs + r[:, None] * width + column[None, :], mask=mask, other=0.0)
            u = (u * tl.load(scale_ptr + current)).to(b.dtype)
            y = tl.where(mine, y + tl.dot(u, b, input_precision="ieee"), y)
        adapter = tl.where(adapter == current, NO_ADAPTER, adapter)
        current = tl.min(adapter, 0)
    return y


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def expand_kernel(
    y_ptr,  # [num_rows, sum of WIDTHS]
    memory_ptr,
    b_ptr,  # [num_segments, num_slots] int64
    rank_ptr,  # [num_segments, num_slots] int32
    scale_ptr,  # [num_segments, num_slots] float32
    parts_ptr,  # [NUM_PARTS, num_segments, num_rows, max_rank]
    order_ptr,  # [num_rows] int32: sorted rows
    work_ptr,  # blocks of experts, or starts of adapters
    slot_of_row_ptr,
    num_rows,
    num_slots,
    max_rank,
    y_stride,
    WIDTHS: tl.constexpr,  # of the segments
    ALIGN: tl.constexpr,  # divides all of them
    EXPERTS: tl.constexpr,  # work_ptr holds blocks of experts
    SLOTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """y[row, n] += sum_r B[r, n] u[row, r]: one block of rows, some columns of a segment."""
    segment = tl.program_id(2)
    block = tl.program_id(0)
    if EXPERTS:
        expert, first, end = _block_of_experts(work_ptr, block)
    else:
        expert, first, end = _block_of_adapters(work_ptr, block, num_slots, SLOTS, BLOCK_M)
    place = first + tl.arange(0, BLOCK_M)
    row_mask = (expert >= 0) & (place < end)
    row = tl.load(order_ptr + place, mask=row_mask, other=0)
    b_ptr += segment * num_slots
    rank_ptr += segment * num_slots
    scale_ptr += segment * num_slots
    adapter = _adapters_with_rank(slot_of_row_ptr, row, row_mask, rank_ptr)
    if EARLY:  # so far only what was written before the shrink began
        gdc_wait()
        gdc_launch_dependents()
    if tl.min(adapter, 0) == NO_ADAPTER:
        return
    begin, width = _width(segment, WIDTHS)
    width = tl.multiple_of(width, ALIGN)
    tiles = tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1), num_stages=1):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = add_low_rank(
            tl.zeros([BLOCK_N, BLOCK_M], tl.float32), adapter, row, column, expert,
            parts_ptr + segment.to(tl.int64) * num_rows * max_rank,
            len(WIDTHS) * num_rows * max_rank, max_rank, memory_ptr,
            b_ptr, rank_ptr, scale_ptr, width, NUM_PARTS, BLOCK_R,
        )  # fmt: skip
        y_ptrs = y_ptr + row[None, :].to(tl.int64) * y_stride + (begin + column)[:, None]
        mask = (adapter < NO_ADAPTER)[None, :] & (column < width)[:, None]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def embedding_shrink_kernel(
    token_ids_ptr,  # [num_rows] int64; -1 - i: sampled[i]
    sampled_ptr,  # [max_num_seqs] int64
    memory_ptr,
    a_ptr,  # [1, num_slots] int64
    rank_ptr,  # [1, num_slots] int32
    scale_ptr,  # [1, num_slots] float32
    parts_ptr,  # [1, 1, num_rows, max_rank]
    slot_of_row_ptr,
    vocab_size,
    max_rank,
    BLOCK_R: tl.constexpr,
):
    """parts[row, r] = scale A[r, token of row], rounded."""
    row = tl.program_id(0)
    slot = tl.load(slot_of_row_ptr + row)
    if slot < 0:
        return
    rank = tl.load(rank_ptr + slot)
    scale = tl.load(scale_ptr + slot)
    start = tl.load(a_ptr + slot) + known_id(token_ids_ptr, sampled_ptr, row)
    for first_r in range(0, rank, BLOCK_R):
        r = first_r + tl.arange(0, BLOCK_R)
        a = tl.load(memory_ptr + start + r.to(tl.int64) * vocab_size, mask=r < rank, other=0.0)
        u = (a.to(tl.float32) * scale).to(parts_ptr.dtype.element_ty)
        u_ptrs = parts_ptr + row.to(tl.int64) * max_rank + r
        tl.store(u_ptrs, u, mask=r < _in_eights(rank))


@dataclass(frozen=True)
class _Work:
    """The rows of a launch, cut into blocks."""

    order: Tensor  # [num_rows] int32: sorted rows
    table: Tensor  # blocks of experts, or starts of adapters
    slot_of_token: Tensor
    num_blocks: int
    block_m: int
    experts: bool = False
    top_k: int = 1  # rows of a token
    gather: bool = True  # x has a row per token, else one per sorted row
    sort_done: bool = True  # before the kernel before began
    x_done: bool = False  # so was x


def _dense_work(rows: LoraRows, site: LoraSite, x_done: bool = False) -> _Work:
    num_rows = len(rows.order)
    block_m = 16 if num_rows <= 32 else 32 if num_rows <= 128 else 64
    num_blocks = max_blocks(num_rows, site.rank.shape[1], block_m)
    return _Work(rows.order, rows.starts, rows.slot_of_row, num_blocks, block_m, x_done=x_done)


def _expert_work(
    slots: SortedSlots, slot_of_token: Tensor, block_m: int, top_k: int, gather: bool
) -> _Work:
    blocks = slots.blocks
    return _Work(
        slots.slots, blocks, slot_of_token, len(blocks), block_m, True, top_k, gather, not gather
    )  # fmt: skip


def shrink_experts(
    x: Tensor,  # [num_tokens or num_pairs, in_features]
    site: LoraSite,
    memory: Tensor,
    slot_of_token: Tensor,  # [num_tokens] int32
    slots: SortedSlots,
    block_m: int,  # that the slots were cut with
    top_k: int,
    gather: bool,  # x has a row per token; otherwise a row per sorted (token, expert) pair
    parts: Tensor,  # from pair_parts
) -> LowRank:
    """The first half of scale (x A_e^T) B_e, for every (token, expert) pair with an adapter.

    For few pairs nothing is launched: `grouped_matmul` does it, once after each sort.
    """
    if len(parts) > 1:
        sums = parts[1:]
        _check(x, site, memory, len(slots.slots), sums)
        return LowRank(site, memory, slot_of_token, _one_part(parts, memory.dtype), sums)
    work = _expert_work(slots, slot_of_token, block_m, top_k, gather)
    return LowRank(site, memory, slot_of_token, _shrink(x, site, memory, work, parts), None)


def add_lora_kernel(
    y: Tensor,  # [num_rows, sum(widths)], changed in place
    x: Tensor,  # [num_rows, in_features]
    site: LoraSite,
    memory: Tensor,
    rows: LoraRows,
    parts: Tensor,  # from low_rank_parts
    after_linear: bool = False,
) -> Tensor:
    """y += scale (x A^T) B for the rows with an adapter, in two launches. Returns y.

    after_linear: the launch before is the `linear` of this x. It has waited for x before it lets
    the next kernel start, so the first launch runs beside it, and the second awaits both.
    """
    work = _dense_work(rows, site, after_linear)
    return _expand(y, site, memory, work, _shrink(x, site, memory, work, parts))


def add_lora_embedding_kernel(
    y: Tensor,  # [num_tokens, hidden], changed in place
    token_ids: Tensor,  # [num_tokens] int64
    site: LoraSite,
    memory: Tensor,
    rows: LoraRows,
    parts: Tensor,  # from low_rank_parts
    sampled: Tensor | None = None,  # [max_num_seqs] int64; None: every id is known
) -> Tensor:
    """y += scale A[:, token]^T B for the rows with an adapter. Returns y."""
    parts = _one_part(parts, memory.dtype)
    if len(token_ids):
        embedding_shrink_kernel[(len(token_ids),)](
            token_ids, token_ids if sampled is None else sampled, memory, site.a, site.rank,
            site.scale, parts, rows.slot_of_row, site.in_features, parts.shape[3],
            BLOCK_R=64, num_warps=2,
        )  # fmt: skip
    return _expand(y, site, memory, _dense_work(rows, site), parts)


def add_expert_lora_kernel(
    y: Tensor,  # [num_pairs, width], changed in place
    x: Tensor,  # [num_pairs, in_features]
    expert_of_row: Tensor,  # [num_pairs] integers
    slot_of_row: Tensor,  # [num_pairs] int32, -1: none
    site: LoraSite,
    memory: Tensor,
    parts: Tensor,  # from low_rank_parts
) -> Tensor:
    """y += scale (x A_e^T) B_e on its own, where no base matmul takes the second half. Returns y.

    Every row is a block of its own: for few rows, such as the self-check of a load.
    """
    row = torch.arange(len(y), dtype=torch.int32, device=y.device)
    blocks = torch.stack((expert_of_row.int(), row, row + 1, row), dim=1)
    work = _expert_work(SortedSlots(row, blocks), slot_of_row, 16, 1, True)
    return _expand(y, site, memory, work, _shrink(x, site, memory, work, parts))


def _shrink(x: Tensor, site: LoraSite, memory: Tensor, work: _Work, parts: Tensor) -> Tensor:
    """Fill parts; returns them, or what they are when one is the whole."""
    _check(x, site, memory, len(work.order), parts)
    if len(parts) == 1:
        parts = _one_part(parts, memory.dtype)
    num_parts, num_segments, num_rows, max_rank = parts.shape
    if work.num_blocks == 0 or max_rank == 0:
        return parts
    tile = _shrink_tile(work)
    rank_tiles = triton.cdiv(max_rank, tile.rows)
    early = dispatch.is_hopper(x)
    shrink_kernel[(work.num_blocks * tile.shares, num_segments * rank_tiles, num_parts)](
        x, memory, site.a, site.b, site.rank, site.scale, parts, work.order, work.table,
        work.slot_of_token, num_rows, site.rank.shape[1], site.in_features, max_rank,
        WIDTHS=site.widths, TOP_K=work.top_k, GATHER=work.gather, EXPERTS=work.experts,
        SLOTS=_padded_slots(work, site.rank.shape[1]), RANK_TILES=rank_tiles,
        SLICES=NUM_SLICES // num_parts, WHOLE=num_parts == 1,
        SHARES=tile.shares, BLOCK_M=work.block_m, BLOCK_R=64, ROWS=tile.rows, BLOCK_K=tile.block_k,
        PREFETCH=early and work.num_blocks <= FEW_BLOCKS and _align(site) % 8 == 0,
        EARLY=early, SORT_DONE=work.sort_done, X_DONE=work.x_done,
        num_warps=4, num_stages=tile.num_stages, launch_pdl=early,
    )  # fmt: skip
    return parts


def _expand(y: Tensor, site: LoraSite, memory: Tensor, work: _Work, parts: Tensor) -> Tensor:
    num_rows, num_segments = len(work.order), len(site.widths)
    if tuple(y.shape) != (num_rows, sum(site.widths)) or y.stride(1) != 1:
        raise ValueError(
            f"y is {tuple(y.shape)} with strides {y.stride()}; needs rows of "
            f"{(num_rows, sum(site.widths))}"
        )
    num_slots, max_rank, block_m = site.rank.shape[1], parts.shape[3], work.block_m
    early = dispatch.is_hopper(y)
    # blocks without work should cost little, however wide y is
    tiles = min(triton.cdiv(max(site.widths), DENSE_BLOCK_N), MOST_TILES)
    grid = (work.num_blocks, tiles, num_segments)
    if work.num_blocks and max_rank:
        expand_kernel[grid](
            y, memory, site.b, site.rank, site.scale, parts, work.order, work.table,
            work.slot_of_token, num_rows, num_slots, max_rank, y.stride(0),
            WIDTHS=site.widths, ALIGN=_align(site), EXPERTS=work.experts,
            SLOTS=_padded_slots(work, num_slots), NUM_PARTS=len(parts),
            BLOCK_M=block_m, BLOCK_N=DENSE_BLOCK_N, BLOCK_R=rank_tile(parts, block_m),
            EARLY=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return y


def _padded_slots(work: _Work, num_slots: int) -> int:
    """How many starts a program reads: blocks of experts need none."""
    return 1 if work.experts else triton.next_power_of_2(num_slots)


def _one_part(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of the first part for values of another dtype, of float32's size or less."""
    first = parts[:1]
    return first.view(-1).view(dtype)[: first.numel()].view(first.shape)


def _align(site: LoraSite) -> int:
    """What divides the rows of all factors, up to 16 values."""
    return math.gcd(16, site.in_features, *site.widths)


@dataclass(frozen=True)
class _ShrinkTile:
    """Sizes of a program of `shrink_kernel`."""

    rows: int  # of A, in a tile 64 high
    block_k: int
    num_stages: int
    shares: int = 1  # programs that share the adapters of a block of rows


def _shrink_tile(work: _Work) -> _ShrinkTile:
    if not work.experts:
        # The linear beside has 160 KB of an SM's shared memory, 192 from 17 tokens on; this has 60
        # or 30. us of both, for q, k, v and output (bench/results/h100/lora_ways.csv): 36 at one
        # token, 41 with BLOCK_K = 256; 50 at 128 tokens, 57 in blocks of 16 rows.
        return _ShrinkTile(work.block_m, 128 if len(work.order) <= 16 else 64, 3)
    return _ShrinkTile(64, 64, 4) if work.block_m >= 64 else _ShrinkTile(64, 128, 4, shares=2)


def rank_tile(parts: Tensor, block_m: int) -> int:
    """Rank-1 terms of one step of a product with B: 64, fewer where many rows fill the registers.

    Parts that are yet to be added pass through registers, u itself goes to shared memory.
    """
    most = 64 if len(parts) == 1 else max(1024 // block_m, 16)
    return min(max(triton.next_power_of_2(parts.shape[3]), 16), most)


def _check(x: Tensor, site: LoraSite, memory: Tensor, num_rows: int, parts: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] != site.in_features or not x.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, strides {x.stride()}; the site needs contiguous "
            f"[rows, {site.in_features}]"
        )
    if x.dtype != memory.dtype:
        raise ValueError(f"x is {x.dtype} and the adapters are {memory.dtype}; use one dtype")
    wanted = (len(site.widths), num_rows)
    if NUM_SLICES % len(parts) or tuple(parts.shape[1:3]) != wanted or parts.dtype != torch.float32:
        raise ValueError(
            f"parts is {tuple(parts.shape)} {parts.dtype}; take it from low_rank_parts (experts: "
            f"pair_parts) for {wanted[0]} segments and {num_rows} rows"
        )
