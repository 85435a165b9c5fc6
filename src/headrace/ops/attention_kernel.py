# mypy: disable-error-code="no-untyped-def"
"""Paged attention on the GPU: a fixed grid of programs that works off the items of a plan.

A row's bits depend on its own position and keys alone. Its keys are taken in blocks from position
0 on, the blocks of a split by online softmax, the splits merged in rising order by one formula. A
program walks all splits of a tile, or several take one split each and the last to arrive merges
them: both run the same instructions.

The rows, tokens times the heads that share a KV head, are the tall side of both products: their
softmax stays within four threads, and the probabilities reach the second product in registers. In
a step of single rows, which would fill an eighth of such a tile, the keys are the tall side. The
bits are the same: maxima have no order, each product is one chain of sums along the head or the
keys, and the sum of the probabilities is such a product, with ones.
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
def _across(x, KEYS_TALL: tl.constexpr):
    """A value of each row, [ROWS], as it meets a tile: [ROWS, 1]; if the keys are tall, [1, ROWS].

    With `not KEYS_TALL`, a value of each key or of each element of a head.
    """
    if KEYS_TALL:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def _dot(rows, other, acc, KEYS_TALL: tl.constexpr):
    """rows other + acc, [ROWS, n]; if the keys are tall, all but `other` are transposed."""
    if KEYS_TALL:
        return tl.dot(tl.trans(other), rows, acc, input_precision="ieee")
    else:
        return tl.dot(rows, other, acc, input_precision="ieee")


@triton.jit
def _row_sums(sums, KEYS_TALL: tl.constexpr):
    """A row's equal sums as they are carried on, [ROWS]; if the keys are tall all, [n, ROWS]."""
    if KEYS_TALL:
        return sums  # to take one, the warps would have to meet
    else:
        return tl.max(sums, 1)


@triton.jit
def _merge_split(m, total, acc, split_m, split_sums, split_acc, KEYS_TALL: tl.constexpr):
    """Maxima, sums of probabilities and of values of a tile's rows, with those of one split."""
    m, weight, split_weight = _merge_weights(m, split_m)
    total = _merge(total, weight, _row_sums(split_sums, KEYS_TALL), split_weight)
    weight, split_weight = _across(weight, KEYS_TALL), _across(split_weight, KEYS_TALL)
    return m, total, _merge(acc, weight, split_acc, split_weight)


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
    KEYS_TALL: tl.constexpr,  # the tall side of both products; then items have one token
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """Scores in powers of two, so that exp2 does: exp(scale q.k) = exp2(scale_log2 q.k)."""
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    TOKEN: tl.constexpr = NUM_KV_HEADS * HEAD_DIM  # elements of a token in the cache
    # Sums of a row's probabilities, all equal: so many fill the smallest product.
    SUMS: tl.constexpr = HEAD_DIM if KEYS_TALL else 8
    if EARLY:
        gdc_launch_dependents()
    column = tl.arange(0, HEAD_DIM)[None, :]
    dim = _across(tl.arange(0, HEAD_DIM), not KEYS_TALL)
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
        row_place = _across(row, KEYS_TALL) * HEAD_DIM + dim
        q_ptrs = q_ptr + start * HEAD_DIM + row_place
        q = tl.load(q_ptrs, mask=_across(mask, KEYS_TALL), other=0.0)
        split_m = tl.full([ROWS], float("-inf"), tl.float32)
        split_sums = tl.zeros([SUMS, ROWS] if KEYS_TALL else [ROWS, SUMS], tl.float32)
        split_acc = tl.zeros(q.shape, tl.float32)
        total = _row_sums(split_sums, KEYS_TALL) + tl.where(whole, 1.0, 0.0)
        acc = split_acc

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
            scores = _dot(q, tl.trans(k), None, KEYS_TALL)
            seen_by, seen = _across(row_position, KEYS_TALL), _across(key, not KEYS_TALL)
            if WINDOWED:
                # one comparison: the age of a key ahead of the row is a huge unsigned number
                age = (seen_by - seen).to(tl.uint32, bitcast=True)
                scores = tl.where(age < window.to(tl.uint32), scores, float("-inf"))
            elif (block + 1) * KEYS > position + 1:
                scores = tl.where(seen <= seen_by, scores, float("-inf"))
            row_max = tl.max(scores, 0 if KEYS_TALL else 1) * scale_log2
            new_m = tl.maximum(split_m, row_max)
            alpha = tl.exp2(split_m - _finite(new_m))
            if not WINDOWED:  # noqa: SIM102 (a window is one split; Triton would evaluate both)
                # Here and not where a split ends, so that its last product runs on until now; of
                # the first block's empty predecessor, the merge changes nothing.
                if _is_cut(block * KEYS):
                    m, total, acc = _merge_split(
                        m, total, acc, split_m, split_sums, split_acc, KEYS_TALL
                    )
                    new_m = row_max
                    alpha = tl.zeros([ROWS], tl.float32)
            split_m = new_m
            p = tl.exp2(scores * scale_log2 - _across(_finite(new_m), KEYS_TALL)).to(v.dtype)
            split_sums *= _across(alpha, KEYS_TALL)
            split_acc *= _across(alpha, KEYS_TALL)
            split_acc = _dot(p, v, split_acc, KEYS_TALL)
            ones = tl.full([KEYS, SUMS], 1.0, v.dtype)
            split_sums = _dot(p, ones, split_sums, KEYS_TALL)
        m, total, acc = _merge_split(m, total, acc, split_m, split_sums, split_acc, KEYS_TALL)

        # fields are loaded again rather than held in registers through the loop
        num_tokens = tl.load(item_ptr + _NUM_TOKENS)
        row, mask = _row_offsets(num_tokens, NUM_HEADS, GROUP, ROWS)
        row_place = _across(row, KEYS_TALL) * HEAD_DIM + dim
        tile_mask = _across(mask, KEYS_TALL)
        parts = 1 if WINDOWED else tl.load(item_ptr + _PARTS)
        if parts == 1:
            start = tl.load(item_ptr + _ROW).to(tl.int64) * NUM_HEADS + kv_head * GROUP
            out = _normalize(acc, total if KEYS_TALL else total[:, None])
            out_ptrs = out_ptr + start * HEAD_DIM + row_place
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=tile_mask)
        else:
            part_row = tl.load(item_ptr + _PART_ROW)
            start = part_row.to(tl.int64) * NUM_HEADS + kv_head * GROUP
            tl.store(part_m_ptr + start + row, m, mask=mask)
            row_total = tl.max(total, 0) if KEYS_TALL else total
            tl.store(part_total_ptr + start + row, row_total, mask=mask)
            tl.store(part_acc_ptr + start * HEAD_DIM + row_place, acc, mask=tile_mask)
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
    shape, tile = plan.shape, plan.tile
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
        KEYS_TALL=plan.single_rows, EARLY=early,
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
