# mypy: disable-error-code="no-untyped-def"
"""Paged attention on the GPU: a fixed grid of programs that works off the items of a plan.

A row's bits depend on its own position and keys alone. Its keys are taken in blocks from position
0 on, the blocks of a split by online softmax, the splits merged in rising order by one formula. A
program walks all splits of a tile, or several take one split each and the last to arrive merges
them: both run the same instructions on a tile of the same size, a chunk of a prompt and a decode
row too.

The rows, tokens times the heads that share a KV head, are the tall side of both products: their
softmax stays within four threads, and the probabilities reach the second product in registers. A
decode row fills an eighth of a tile of 64 rows; what is read from memory is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops import attention_plan, dispatch
from headrace.ops.arrival_kernel import arrive
from headrace.ops.attention_plan import FIELDS, HEADER, AttentionPlan
from headrace.ops.prefetch_kernel import prefetch_lines

LOG2_E = 1.4426950408889634

_HEADER = tl.constexpr(HEADER)
_NUM_FIELDS = tl.constexpr(len(FIELDS))
_ROW = tl.constexpr(attention_plan.ROW)
_NUM_TOKENS = tl.constexpr(attention_plan.NUM_TOKENS)
_POSITION = tl.constexpr(attention_plan.POSITION)
_SEQ = tl.constexpr(attention_plan.SEQ)
_FIRST_BLOCK = tl.constexpr(attention_plan.FIRST_BLOCK)
_END_BLOCK = tl.constexpr(attention_plan.END_BLOCK)
_PARTS = tl.constexpr(attention_plan.PARTS)
_PART = tl.constexpr(attention_plan.PART)
_PART_ROW = tl.constexpr(attention_plan.PART_ROW)
_COUNTER = tl.constexpr(attention_plan.COUNTER)
_CUTS = tl.constexpr(attention_plan.CUTS)
_SPLITS = tl.constexpr(attention_plan.SPLITS)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _is_cut(key):
    """True if a split begins at this key, the first of a block."""
    first = (key % _SPLITS[0] == 0) & (key < _CUTS[0])
    second = (key % _SPLITS[1] == 0) & (key < _CUTS[1])
    return first | second | (key % _SPLITS[2] == 0)


@triton.jit
def _finite(m):
    """A maximum to subtract: 0 where nothing was seen yet, so that exp2(-inf - m) is 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _merge_weights(m, split_m):
    """Maximum of what came before and of one split, and what each is multiplied with.

    A split without a visible key has maximum -inf and weight 0: it changes nothing.
    """
    new_m = tl.maximum(m, split_m)
    return new_m, tl.exp2(m - _finite(new_m)), tl.exp2(split_m - _finite(new_m))


@triton.jit
def _merge(x, weight, split_x, split_weight):
    """x weight + split_x split_weight, rounded alike wherever the compiler puts it."""
    return tl.fma(x, weight, split_x * split_weight)


@triton.jit
def _normalize(acc, total):
    """acc / total, a zero always as +0."""
    return tl.where(acc == 0.0, 0.0, acc) * (1.0 / total)


@triton.jit
def _combine_parts(
    out_ptr,
    sinks_ptr,
    part_acc_ptr,
    part_m_ptr,
    part_total_ptr,
    row,
    first_part_row,
    num_tokens,
    parts,
    first_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Merge the parts of a tile in rising order, token by token."""
    of_group = tl.arange(0, PADDED_GROUP)
    mask = of_group < GROUP
    tile_mask = tl.broadcast_to(mask[:, None], (PADDED_GROUP, HEAD_DIM))
    column = tl.arange(0, HEAD_DIM)[None, :]
    head = first_head + of_group
    sink = tl.load(sinks_ptr + head, mask=mask, other=0.0).to(tl.float32) * _LOG2_E
    for token in range(num_tokens):
        m = sink
        total = tl.full([PADDED_GROUP], 1.0, tl.float32)
        acc = tl.zeros([PADDED_GROUP, HEAD_DIM], tl.float32)
        for first_part in range(0, parts, 8):
            for i in tl.static_range(8):  # so many loads are under way together
                part = first_part + i
                place = (first_part_row + part * num_tokens + token).to(tl.int64) * NUM_HEADS + head
                there = mask & (part < parts)
                # .cg: another multiprocessor wrote them
                part_m = tl.load(
                    part_m_ptr + place, mask=there, other=float("-inf"), cache_modifier=".cg"
                )
                part_total = tl.load(
                    part_total_ptr + place, mask=there, other=0.0, cache_modifier=".cg"
                )
                part_acc = tl.load(
                    part_acc_ptr + place[:, None] * HEAD_DIM + column,
                    mask=tile_mask & (part < parts),
                    other=0.0,
                    cache_modifier=".cg",
                )
                m, weight, part_weight = _merge_weights(m, part_m)
                total = _merge(total, weight, part_total, part_weight)
                acc = _merge(acc, weight[:, None], part_acc, part_weight[:, None])
        out_row = (row + token).to(tl.int64) * NUM_HEADS + head
        out = _normalize(acc, total[:, None])
        tl.store(
            out_ptr + out_row[:, None] * HEAD_DIM + column,
            out.to(out_ptr.dtype.element_ty),
            mask=tile_mask,
        )


@triton.jit
def _load_pages(
    table_row_ptr, block_stride, block, end_key, PAGE: tl.constexpr, KEYS: tl.constexpr
):
    """Pages of a block of keys, [pages a block] int32; 0 from end_key on."""
    PAGES: tl.constexpr = max(KEYS // PAGE, 1)
    first_page = block * PAGES if KEYS >= PAGE else block // (PAGE // KEYS)
    page = first_page + tl.arange(0, PAGES)
    return tl.load(table_row_ptr + page * block_stride, mask=page * PAGE < end_key, other=0)


@triton.jit
def _place_of_keys(pages, block, PAGE: tl.constexpr, KEYS: tl.constexpr, TOKEN: tl.constexpr):
    """Where the keys of a block begin in the cache, [KEYS] int64, in elements."""
    PAGES: tl.constexpr = max(KEYS // PAGE, 1)
    pages = tl.broadcast_to(pages[:, None], (PAGES, KEYS // PAGES)).reshape(KEYS)
    in_page = tl.arange(0, KEYS) % PAGE
    if KEYS < PAGE:
        in_page += block % (PAGE // KEYS) * KEYS
    # multiplied last, so that the compiler sees what it is a multiple of
    return pages.to(tl.int64) * (PAGE * TOKEN) + in_page * TOKEN


@triton.jit
def _prefetch_keys(
    k_ptr, value_offset, pages, block, PAGE: tl.constexpr, KEYS: tl.constexpr, TOKEN: tl.constexpr
):
    """Ask for a block's keys and values, to have them in L2 when they may be read."""
    pages = tl.maximum(pages, 0)  # -1 before a window
    k_ptrs = k_ptr + _place_of_keys(pages, block, PAGE, KEYS, TOKEN)
    for i in tl.static_range(2):
        prefetch_lines(k_ptrs + i * value_offset)


@triton.jit
def _row_offsets(num_tokens, NUM_HEADS, GROUP, ROWS: tl.constexpr):
    """Where each row of a tile lies in [tokens, num_heads] from its first; which of them exist."""
    row = tl.arange(0, ROWS)
    return row // GROUP * NUM_HEADS + row % GROUP, row < num_tokens * GROUP


@triton.jit(
    do_not_specialize=["counters_start", "seq_stride", "block_stride", "window"],
    do_not_specialize_on_alignment=["table_ptr", "sinks_ptr"],
)
def attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    cache_ptr,  # [2 (k, v), num_pages, PAGE, num_kv_heads, head_dim]
    table_ptr,  # [num_seqs, max_blocks] int32
    sinks_ptr,  # [num_heads]
    words_ptr,  # an AttentionPlan
    part_acc_ptr,  # [max_part_rows, num_heads, head_dim] float32
    part_m_ptr,  # [max_part_rows, num_heads] float32
    part_total_ptr,
    out_ptr,  # [num_tokens, num_heads, head_dim]
    counters_start,  # in words
    seq_stride,  # of the table
    block_stride,
    value_offset,  # elements from k to v
    scale_log2,  # scale * log2(e)
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """Scores in powers of two, so that exp2 does: exp(scale q.k) = exp2(scale_log2 q.k)."""
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    TOKEN: tl.constexpr = NUM_KV_HEADS * HEAD_DIM  # elements of a token in the cache
    if EARLY:
        gdc_launch_dependents()
    column = tl.arange(0, HEAD_DIM)[None, :]
    num_work = tl.load(words_ptr) * NUM_KV_HEADS
    # disable_licm: what only the end of an item needs must not lie in registers through its loop
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), disable_licm=True):
        item_ptr = words_ptr + _HEADER + work // NUM_KV_HEADS * _NUM_FIELDS
        kv_head = work % NUM_KV_HEADS
        num_tokens = tl.load(item_ptr + _NUM_TOKENS)
        position = tl.load(item_ptr + _POSITION)
        table_row_ptr = table_ptr + tl.load(item_ptr + _SEQ).to(tl.int64) * seq_stride
        first_block = tl.load(item_ptr + _FIRST_BLOCK)
        end_block = tl.load(item_ptr + _END_BLOCK)
        row_position = position + tl.arange(0, ROWS) // GROUP
        first_key = tl.maximum(position - window + 1, 0) if WINDOWED else 0
        end_key = position + num_tokens
        start = tl.load(item_ptr + _ROW).to(tl.int64) * NUM_HEADS + kv_head * GROUP
        # the sink counts once: here, or when the parts are merged
        whole = tl.load(item_ptr + _PARTS) == 1
        head = kv_head * GROUP + tl.arange(0, ROWS) % GROUP
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E
        m = tl.where(whole, sink, float("-inf"))
        k_ptr = cache_ptr + kv_head * HEAD_DIM
        pages = _load_pages(table_row_ptr, block_stride, first_block, end_key, PAGE, KEYS)
        if EARLY:
            # so far only weights, and what the host has written: plan and table
            _prefetch_keys(k_ptr, value_offset, pages, first_block, PAGE, KEYS, TOKEN)
            gdc_wait()

        row, mask = _row_offsets(num_tokens, NUM_HEADS, GROUP, ROWS)
        q_ptrs = q_ptr + start * HEAD_DIM + row[:, None] * HEAD_DIM + column
        q = tl.load(q_ptrs, mask=mask[:, None], other=0.0)
        total = tl.where(whole, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        split_m = tl.full([ROWS], float("-inf"), tl.float32)
        split_total = tl.zeros([ROWS], tl.float32)
        split_acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)

        for block in range(first_block, end_block):
            key = block * KEYS + tl.arange(0, KEYS)
            key_mask = key < end_key
            if WINDOWED:
                key_mask &= key >= first_key
            place = _place_of_keys(pages, block, PAGE, KEYS, TOKEN)[:, None]
            # zeros where masked: what lies there may be NaN, which 0 * v would keep
            k = tl.load(k_ptr + column + place, mask=key_mask[:, None], other=0.0)
            v = tl.load(k_ptr + value_offset + column + place, mask=key_mask[:, None], other=0.0)
            # ready when the next keys are asked for
            pages = _load_pages(table_row_ptr, block_stride, block + 1, end_key, PAGE, KEYS)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if WINDOWED:
                # one comparison: the age of a key ahead of the row is a huge unsigned number
                age = (row_position[:, None] - key[None, :]).to(tl.uint32, bitcast=True)
                scores = tl.where(age < window.to(tl.uint32), scores, float("-inf"))
            elif (block + 1) * KEYS > position + 1:
                scores = tl.where(key[None, :] <= row_position[:, None], scores, float("-inf"))
            row_max = tl.max(scores, 1) * scale_log2
            new_m = tl.maximum(split_m, row_max)
            alpha = tl.exp2(split_m - _finite(new_m))
            if not WINDOWED:  # noqa: SIM102 (a window is one split; Triton would evaluate both)
                # Here and not where a split ends, so that its last product runs on until now; of
                # the first block's empty predecessor, the merge changes nothing.
                if _is_cut(block * KEYS):
                    m, weight, split_weight = _merge_weights(m, split_m)
                    total = _merge(total, weight, split_total, split_weight)
                    acc = _merge(acc, weight[:, None], split_acc, split_weight[:, None])
                    new_m = row_max
                    alpha = tl.zeros([ROWS], tl.float32)
            split_m = new_m
            p = tl.exp2(scores * scale_log2 - _finite(new_m)[:, None])
            split_total = split_total * alpha + tl.sum(p, 1)
            split_acc *= alpha[:, None]
            split_acc = tl.dot(p.to(v.dtype), v, split_acc, input_precision="ieee")
        m, weight, split_weight = _merge_weights(m, split_m)
        total = _merge(total, weight, split_total, split_weight)
        acc = _merge(acc, weight[:, None], split_acc, split_weight[:, None])

        # fields are loaded again rather than held in registers through the loop
        num_tokens = tl.load(item_ptr + _NUM_TOKENS)
        row, mask = _row_offsets(num_tokens, NUM_HEADS, GROUP, ROWS)
        parts = 1 if WINDOWED else tl.load(item_ptr + _PARTS)
        if parts == 1:
            start = tl.load(item_ptr + _ROW).to(tl.int64) * NUM_HEADS + kv_head * GROUP
            out_ptrs = out_ptr + start * HEAD_DIM + row[:, None] * HEAD_DIM + column
            out = _normalize(acc, total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptrs, out, mask=mask[:, None])
        else:
            part_row = tl.load(item_ptr + _PART_ROW)
            start = part_row.to(tl.int64) * NUM_HEADS + kv_head * GROUP
            tl.store(part_m_ptr + start + row, m, mask=mask)
            tl.store(part_total_ptr + start + row, total, mask=mask)
            acc_ptrs = part_acc_ptr + start * HEAD_DIM + row[:, None] * HEAD_DIM + column
            tl.store(acc_ptrs, acc, mask=mask[:, None])
            counter = counters_start + tl.load(item_ptr + _COUNTER) * NUM_KV_HEADS + kv_head
            if arrive(words_ptr + counter, parts):
                _combine_parts(
                    out_ptr, sinks_ptr, part_acc_ptr, part_m_ptr, part_total_ptr,
                    tl.load(item_ptr + _ROW),
                    part_row - tl.load(item_ptr + _PART) * num_tokens, num_tokens, parts,
                    kv_head * GROUP, NUM_HEADS, GROUP, PADDED_GROUP, HEAD_DIM,
                )  # fmt: skip


def paged_attention(
    q: Tensor,  # [num_tokens, num_heads, head_dim]
    kv_cache: Tensor,  # [2 (k, v), num_pages, block_size, num_kv_heads, head_dim]
    block_table: Tensor,  # [num_seqs, max_blocks] int32
    sinks: Tensor,  # [num_heads]
    scale: float,
    plan: AttentionPlan,
    out: Tensor,  # [num_tokens, num_heads, head_dim]
) -> Tensor:
    """Work off the plan's items; its window is the layer's. Rows in no item are not written.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take.
    """
    _check(q, kv_cache, block_table, sinks, scale, plan, out)
    shape, tile = plan.shape, plan.shape.tile
    page, num_kv_heads, head_dim = kv_cache.shape[2:]
    group = shape.num_heads // num_kv_heads
    early = dispatch.is_hopper(q)
    attention_kernel[(shape.grid(len(q)),)](
        q, kv_cache, block_table, sinks, plan.words,
        plan.part_acc, plan.part_m, plan.part_total, out,
        shape.counters_start, *block_table.stride(), kv_cache.stride(0), scale * LOG2_E,
        plan.window,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, PADDED_GROUP=triton.next_power_of_2(group),
        HEAD_DIM=head_dim, PAGE=page, WINDOWED=plan.window > 0, ROWS=tile.rows, KEYS=tile.keys,
        EARLY=early,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        maxnreg=tile.max_registers, launch_pdl=early,
    )  # fmt: skip
    return out


def _check(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    sinks: Tensor,
    scale: float,
    plan: AttentionPlan,
    out: Tensor,
) -> None:
    heads = (plan.shape.num_heads, plan.shape.head_dim)
    if q.dim() != 3 or tuple(q.shape[1:]) != heads or not q.is_contiguous():
        raise ValueError(
            f"q has shape {tuple(q.shape)}, strides {q.stride()}; the plan needs contiguous "
            f"[num_tokens, {heads[0]}, {heads[1]}]"
        )
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; pass contiguous {q.dtype} {tuple(q.shape)}"
        )
    wanted = (plan.shape.num_kv_heads, q.shape[2])
    if kv_cache.dim() != 5 or tuple(kv_cache.shape[3:]) != wanted or len(kv_cache) != 2:
        raise ValueError(
            f"kv_cache has shape {tuple(kv_cache.shape)}; q and the plan need "
            f"[2, num_pages, block_size, {wanted[0]}, {wanted[1]}]"
        )
    if not kv_cache[0].is_contiguous() or kv_cache.dtype != q.dtype:
        raise ValueError(f"kv_cache is {kv_cache.dtype}, q {q.dtype}: pass one contiguous dtype")
    for name, size in (("block_size", kv_cache.shape[2]), ("head_dim", q.shape[2])):
        if size & (size - 1) or (name == "head_dim" and size < 16):
            raise ValueError(f"{name} is {size}; the kernel needs a power of two (head_dim >= 16)")
    if block_table.dim() != 2 or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}; pass int32 "
            "[num_seqs, max_blocks]"
        )
    if tuple(sinks.shape) != heads[:1] or not sinks.is_contiguous():
        raise ValueError(f"sinks have shape {tuple(sinks.shape)}; q needs contiguous {heads[:1]}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; scores are scaled after their maximum: pass > 0")
