# mypy: disable-error-code="no-untyped-def"
"""Sampling on the GPU: every launch cuts each row into chunks, a second one joins a row's chunks.

No sort and no atomics. Probabilities are added as integers, exp(y - max(y)) in units of 2**-44:
such sums have the same bits in any order. A vocabulary of 2**18 tokens fits, and rounding loses
at most 2**-45 a token. Floats are compared as integers of the same order.

top_k and top_p ask for the smallest logit that is kept. A first pass measures the row at a few
levels under its maximum, which brackets the answer; where too many tokens lie in the bracket, a
second pass measures it at levels within. The tokens that are left become candidates, among which
one program a row finds the answer, by 8 pivots a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.ops.arena import fresh
from headrace.ops.sampling import (
    CHUNK,
    MAX_CANDIDATES,
    MAX_TOP,
    NUM_LEVELS,
    Draws,
    SamplingBuffers,
    sampling_buffers,
)

MASS_ONE = tl.constexpr(float(2**44))
LOWEST = tl.constexpr(-(2**63))  # below every ranked token
FIRST_ORDER = tl.constexpr(-(2**31))  # below every float's order
LAST_TOKEN = tl.constexpr(2**31 - 1)
LEVELS = tl.constexpr(NUM_LEVELS)
LEVEL_STEP = tl.constexpr(2.0)  # nats between two levels of the first pass
MOST = tl.constexpr(MAX_CANDIDATES)


@triton.jit
def _order(x):
    """int32 that sorts as the float32 does; -0.0 as 0.0, NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _value(order):
    """The float32 of an order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _ranked(x, token):
    """int64 that sorts by value, and among equals the lower token as larger."""
    return _ranked_order(_order(x), token)


@triton.jit
def _ranked_order(order, token):
    """The same of what _order made."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _token(ranked):
    return 0x7FFFFFFF - (ranked & 0xFFFFFFFF)


@triton.jit
def _mass(y, largest):
    """exp(y - largest) in fixed point; 0 if that is NaN."""
    p = tl.where(y == largest, 1.0, tl.exp(y - largest))
    return tl.where(p == p, p * MASS_ONE + 0.5, 0.0).to(tl.int64)


@triton.jit
def _draw_params(draw, rows_ptr, temperature_ptr, log_min_p_ptr, largest_ptr):
    """A draw's row, temperature, largest scaled logit, and the smallest one that min_p keeps."""
    row = tl.load(rows_ptr + draw)
    temperature = tl.load(temperature_ptr + draw)
    largest = tl.div_rn(tl.load(largest_ptr + row), temperature)
    return row, temperature, largest, largest + tl.load(log_min_p_ptr + draw)


@triton.jit
def _scaled(row_ptr, token, mask, temperature):
    return tl.div_rn(tl.load(row_ptr + token, mask=mask, other=float("-inf")), temperature)


@triton.jit
def _limits(draw, top_k_ptr, top_p_ptr, vocab):
    """top_k, 0 if it keeps all, and top_p."""
    top_k = tl.load(top_k_ptr + draw)
    return tl.where(top_k < vocab, top_k, 0), tl.load(top_p_ptr + draw)


@triton.jit
def _target(top_p, total):
    """The mass that top_p asks for; at least one token's."""
    wanted = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(wanted, 1)


@triton.jit(do_not_specialize=["num_chunks"])
def best_kernel(
    logits_ptr,  # [num_rows, vocab]
    best_ptr,  # [num_rows, num_chunks] int64
    stride_row,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
):
    """The best token of one chunk."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride_row + token, mask=token < vocab, other=float("-inf"))
    # two reductions of 32 bits: 64 rows take 19.3 us, with one of 64 bits 21.3
    order = _order(x)
    best = tl.max(order)
    token = tl.min(tl.where(order == best, token, LAST_TOKEN))
    tl.store(best_ptr + row * num_chunks + chunk, _ranked_order(best, token))


@triton.jit(do_not_specialize=["num_chunks"])
def argmax_kernel(
    best_ptr,
    largest_ptr,  # [num_rows] fp32
    out_ptr,  # [num_rows] int64
    num_chunks,
    CHUNKS: tl.constexpr,
):
    """The best token of one row, and its logit."""
    row = tl.program_id(0)
    chunk = tl.minimum(tl.arange(0, CHUNKS), num_chunks - 1)
    best = tl.max(tl.load(best_ptr + row * num_chunks + chunk))
    tl.store(largest_ptr + row, _value((best >> 32).to(tl.int32)))
    tl.store(out_ptr + row, _token(best))


@triton.jit
def _first_orders(largest):
    """Levels of the first pass, falling; the last one has (almost) every float over it."""
    level = tl.arange(0, LEVELS)
    return _order(largest - tl.where(level == LEVELS - 1, 3e38, LEVEL_STEP * (level + 1)))


@triton.jit
def _finer_orders(low, high):
    """Levels of the second pass, falling from `high` to `low`."""
    return (high - (high - low) * (tl.arange(0, LEVELS) + 1) // LEVELS).to(tl.int32)


@triton.jit
def _over_level(ptr, at, num_chunks, end, CHUNKS: tl.constexpr):
    """Number or mass over a level in the chunks before `end`; 0 for the level -1."""
    chunk = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(ptr + at * num_chunks + chunk, mask=(chunk < end) & (at >= 0), other=0))


@triton.jit
def _narrow(
    orders,  # [LEVELS]
    first_at,
    high,
    high_at,
    target,
    by_count,
    level_counts_ptr,
    level_masses_ptr,
    num_chunks,
    CHUNKS: tl.constexpr,
):
    """The first level over which the target is reached, and but for top_k the one before it."""
    level = tl.arange(0, LEVELS)
    chunk = tl.arange(0, CHUNKS)
    place = (first_at + level)[:, None] * num_chunks + chunk[None, :]
    mask = (chunk < num_chunks)[None, :]
    counts = tl.sum(tl.load(level_counts_ptr + place, mask=mask, other=0), 1)
    masses = tl.sum(tl.load(level_masses_ptr + place, mask=mask, other=0), 1)
    missed = tl.where(by_count, counts.to(tl.int64), masses) < target
    chosen = tl.minimum(tl.sum(missed.to(tl.int32)), LEVELS - 1)
    low = tl.sum(tl.where(level == chosen, orders, 0)).to(tl.int64)
    before = tl.sum(tl.where(level == chosen - 1, orders, 0)).to(tl.int64)
    closer = (chosen > 0) & (not by_count)
    high = tl.where(closer, before, high)
    high_at = tl.where(closer, first_at + chosen - 1, high_at)
    return low, high, first_at + chosen, high_at


@triton.jit
def _bracket(
    draw,
    top_k,
    top_p,
    largest,
    level_counts_ptr,
    level_masses_ptr,
    num_chunks,
    FINER: tl.constexpr,  # whether there has been a second pass
    CHUNKS: tl.constexpr,
):
    """Orders low <= x < high of the last token that top_k, or without it top_p, keeps.

    With top_k all larger ones are in the bracket, for their mass must be known.
    Returns low and high, the levels they are, the number of tokens between them, and the number
    (top_k) or mass (top_p) that the kept tokens must reach.
    """
    first_at = draw * 2 * LEVELS
    all_at = first_at + LEVELS - 1
    num_all = _over_level(level_counts_ptr, all_at, num_chunks, num_chunks, CHUNKS)
    total = _over_level(level_masses_ptr, all_at, num_chunks, num_chunks, CHUNKS)
    by_count = top_k > 0
    target = tl.where(by_count, tl.minimum(top_k, num_all).to(tl.int64), _target(top_p, total))
    high = _order(largest).to(tl.int64) + 1
    low, high, low_at, high_at = _narrow(
        _first_orders(largest), first_at, high, tl.full([], -1, tl.int32), target, by_count,
        level_counts_ptr, level_masses_ptr, num_chunks, CHUNKS,
    )  # fmt: skip
    size = _over_level(level_counts_ptr, low_at, num_chunks, num_chunks, CHUNKS)
    size -= _over_level(level_counts_ptr, high_at, num_chunks, num_chunks, CHUNKS)
    if FINER:  # noqa: SIM102 (Triton would evaluate both sides of an `and`)
        if size > MOST:
            low, high, low_at, high_at = _narrow(
                _finer_orders(low, high), first_at + LEVELS, high, high_at, target, by_count,
                level_counts_ptr, level_masses_ptr, num_chunks, CHUNKS,
            )  # fmt: skip
            size = _over_level(level_counts_ptr, low_at, num_chunks, num_chunks, CHUNKS)
            size -= _over_level(level_counts_ptr, high_at, num_chunks, num_chunks, CHUNKS)
    return low, high, low_at, high_at, size, target


@triton.jit(do_not_specialize=["num_chunks"])
def levels_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    largest_ptr,
    level_counts_ptr,  # [num_filtered, 2 passes, LEVELS, num_chunks] int32
    level_masses_ptr,  # [num_filtered, 2 passes, LEVELS, num_chunks] int64
    stride_row,
    vocab,
    num_chunks,
    FINER: tl.constexpr,  # the second pass
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Number and mass of one chunk's tokens over each level, min_p applied."""
    chunk = tl.program_id(0)
    draw = tl.program_id(1)
    row, temperature, largest, floor = _draw_params(
        draw, rows_ptr, temperature_ptr, log_min_p_ptr, largest_ptr
    )
    orders = _first_orders(largest)
    first_at = draw * 2 * LEVELS
    if FINER:
        top_k, top_p = _limits(draw, top_k_ptr, top_p_ptr, vocab)
        low, high, _, _, size, _ = _bracket(
            draw, top_k, top_p, largest, level_counts_ptr, level_masses_ptr, num_chunks, False,
            CHUNKS,
        )  # fmt: skip
        if size <= MOST:
            return
        orders = _finer_orders(low, high)
        first_at += LEVELS
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    y = _scaled(logits_ptr + row * stride_row, token, token < vocab, temperature)
    order, mass = _order(y), _mass(y, largest)
    kept = (token < vocab) & (y >= floor)
    for level in range(LEVELS):  # unrolled it would need twice the registers
        bound = tl.sum(tl.where(tl.arange(0, LEVELS) == level, orders, 0))
        over = kept & (order >= bound)
        place = (first_at + level) * num_chunks + chunk
        tl.store(level_counts_ptr + place, tl.sum(over.to(tl.int32)))
        tl.store(level_masses_ptr + place, tl.sum(tl.where(over, mass, 0)))


@triton.jit(do_not_specialize=["num_chunks"])
def candidates_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    largest_ptr,
    level_counts_ptr,
    level_masses_ptr,
    candidates_ptr,  # [num_filtered, MOST] int32
    stride_row,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Write one chunk's tokens in the row's bracket, by their ids, unless they are too many."""
    chunk = tl.program_id(0)
    draw = tl.program_id(1)
    top_k, top_p = _limits(draw, top_k_ptr, top_p_ptr, vocab)
    row, temperature, largest, floor = _draw_params(
        draw, rows_ptr, temperature_ptr, log_min_p_ptr, largest_ptr
    )
    low, high, low_at, high_at, size, _ = _bracket(
        draw, top_k, top_p, largest, level_counts_ptr, level_masses_ptr, num_chunks, True, CHUNKS
    )
    if size <= MOST:
        earlier = _over_level(level_counts_ptr, low_at, num_chunks, chunk, CHUNKS)
        earlier -= _over_level(level_counts_ptr, high_at, num_chunks, chunk, CHUNKS)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        y = _scaled(logits_ptr + row * stride_row, token, token < vocab, temperature)
        order = _order(y)
        between = (order >= low.to(tl.int32)) & (order <= (high - 1).to(tl.int32))
        inside = (token < vocab) & (y >= floor) & between
        place = earlier + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(candidates_ptr + draw * MOST + place, token, mask=inside)


@triton.jit
def _search_block(
    start,
    num,
    listed,
    candidates_ptr,
    row_ptr,
    temperature,
    largest,
    floor,
    cut_order,
    cut_token,
    BLOCK: tl.constexpr,
):
    """Tokens of one block of the search, their order and mass, and whether they are kept so far."""
    place = start + tl.arange(0, BLOCK)
    inside = place < num
    found = tl.load(candidates_ptr + place, mask=inside & listed, other=0)
    token = tl.where(listed, found, place)
    y = _scaled(row_ptr, token, inside, temperature)
    order = _order(y)
    kept = inside & (y >= floor)
    kept = kept & ((order > cut_order) | ((order == cut_order) & (token <= cut_token)))
    return token, order, _mass(y, largest), kept


@triton.jit
def _cut(
    target,
    low,
    high,
    above,
    base,
    num,
    listed,
    candidates_ptr,
    row_ptr,
    temperature,
    largest,
    floor,
    cut_order,
    cut_token,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Keep the fewest of the tokens kept so far whose number (or mass) reaches the target.

    The tokens of at least the order `low` reach it; those of at least `high` don't, they come to
    `above`. Tokens that are not searched come to `base`. All int64.
    """
    while high - low > 1:
        pivots = low + (((high - low) * tl.arange(0, PIVOTS)) // PIVOTS)
        reached = tl.zeros([PIVOTS], tl.int64) + base
        for start in range(0, num, BLOCK):
            _, order, mass, kept = _search_block(
                start, num, listed, candidates_ptr, row_ptr, temperature, largest, floor,
                cut_order, cut_token, BLOCK,
            )  # fmt: skip
            weight = tl.where(kept, mass if BY_MASS else 1, 0).to(tl.int64)
            over = order[None, :] >= pivots.to(tl.int32)[:, None]
            reached += tl.sum(tl.where(over, weight[None, :], 0), 1)
        enough = reached >= target
        above = tl.max(tl.where(enough, above, reached))
        low = tl.max(tl.where(enough, pivots, low))
        high = tl.min(tl.where(enough, high, pivots))
    new_order = low.to(tl.int32)
    each = tl.full([], 1, tl.int64)
    if BY_MASS:
        each = tl.maximum(_mass(_value(new_order), largest), 1)
    # `high` is next to `low`: what is over it, is larger
    num_equal = ((target - above + each - 1) // each).to(tl.int32)  # to keep, by their ids
    new_token = tl.full([], LAST_TOKEN, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for start in range(0, num, BLOCK):
        token, order, _, kept = _search_block(
            start, num, listed, candidates_ptr, row_ptr, temperature, largest, floor,
            cut_order, cut_token, BLOCK,
        )  # fmt: skip
        equal = (kept & (order == new_order)).to(tl.int32)
        last = (equal > 0) & (seen + tl.cumsum(equal, 0) == num_equal)
        new_token = tl.minimum(new_token, tl.min(tl.where(last, token, LAST_TOKEN)))
        seen += tl.sum(equal)
    return new_order, new_token


@triton.jit(do_not_specialize=["num_chunks"])
def search_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    largest_ptr,
    level_counts_ptr,
    level_masses_ptr,
    candidates_ptr,
    cuts_ptr,  # [num_filtered, 2] int32
    stride_row,
    vocab,
    num_chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Order and token of the last one that top_k and top_p keep, of one row."""
    draw = tl.program_id(0)
    top_k, top_p = _limits(draw, top_k_ptr, top_p_ptr, vocab)
    row, temperature, largest, floor = _draw_params(
        draw, rows_ptr, temperature_ptr, log_min_p_ptr, largest_ptr
    )
    low, high, _low_at, high_at, size, target = _bracket(
        draw, top_k, top_p, largest, level_counts_ptr, level_masses_ptr, num_chunks, True, CHUNKS
    )
    above = _over_level(level_masses_ptr, high_at, num_chunks, num_chunks, CHUNKS)
    row_ptr = logits_ptr + row * stride_row
    candidates_ptr += draw * MOST
    listed = size <= MOST
    num = tl.where(listed, size, vocab)
    base = tl.where(listed, above, 0)
    cut_order = tl.full([], FIRST_ORDER, tl.int32)
    cut_token = tl.full([], LAST_TOKEN, tl.int32)
    if top_k > 0:
        cut_order, cut_token = _cut(
            target, low, high, above, base, num, listed, candidates_ptr, row_ptr,
            temperature, largest, floor, cut_order, cut_token, False, BLOCK, PIVOTS,
        )  # fmt: skip
        if top_p < 1.0:
            total = tl.full([], 0, tl.int64)
            for start in range(0, num, BLOCK):
                _, _, mass, kept = _search_block(
                    start, num, listed, candidates_ptr, row_ptr, temperature, largest, floor,
                    cut_order, cut_token, BLOCK,
                )  # fmt: skip
                total += tl.sum(tl.where(kept, mass, 0))
            target = _target(top_p, total)
    if top_p < 1.0:
        cut_order, cut_token = _cut(
            target, low, high, above, base, num, listed, candidates_ptr, row_ptr,
            temperature, largest, floor, cut_order, cut_token, True, BLOCK, PIVOTS,
        )  # fmt: skip
    tl.store(cuts_ptr + draw * 2, cut_order)
    tl.store(cuts_ptr + draw * 2 + 1, cut_token)


@triton.jit
def _chunk_masses(
    draw, row_ptr, chunk, temperature, largest, floor, cuts_ptr, num_filtered, vocab,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Mass of each token of a chunk that may be drawn; 0 for the others."""
    filtered = draw < num_filtered
    cut_order = tl.load(cuts_ptr + draw * 2, mask=filtered, other=FIRST_ORDER)
    cut_token = tl.load(cuts_ptr + draw * 2 + 1, mask=filtered, other=0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    y = _scaled(row_ptr, token, token < vocab, temperature)
    order = _order(y)
    kept = (order > cut_order) | ((order == cut_order) & (token <= cut_token))
    kept = kept & (token < vocab) & (y >= floor)
    return tl.where(kept, _mass(y, largest), 0)


@triton.jit(do_not_specialize=["num_chunks", "num_filtered"])
def masses_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    log_min_p_ptr,
    largest_ptr,
    cuts_ptr,
    masses_ptr,  # [num_draws, num_chunks] int64
    stride_row,
    vocab,
    num_chunks,
    num_filtered,
    CHUNK: tl.constexpr,
):
    """Mass of one chunk."""
    chunk = tl.program_id(0)
    draw = tl.program_id(1)
    row, temperature, largest, floor = _draw_params(
        draw, rows_ptr, temperature_ptr, log_min_p_ptr, largest_ptr
    )
    masses = _chunk_masses(
        draw, logits_ptr + row * stride_row, chunk, temperature, largest, floor, cuts_ptr,
        num_filtered, vocab, CHUNK,
    )  # fmt: skip
    tl.store(masses_ptr + draw * num_chunks + chunk, tl.sum(masses))


@triton.jit(do_not_specialize=["num_chunks", "num_filtered"])
def draw_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    log_min_p_ptr,
    largest_ptr,
    cuts_ptr,
    masses_ptr,
    uniform_ptr,  # [num_draws] float64
    out_ptr,  # [num_rows] int64
    stride_row,
    vocab,
    num_chunks,
    num_filtered,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The first token with p(0) + ... + p(token) > uniform, of one row: its chunk, then itself."""
    draw = tl.program_id(0)
    row, temperature, largest, floor = _draw_params(
        draw, rows_ptr, temperature_ptr, log_min_p_ptr, largest_ptr
    )
    chunks = tl.arange(0, CHUNKS)
    masses = tl.load(masses_ptr + draw * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    total = tl.sum(masses)
    # whole numbers: sum > uniform * total is sum > floor(uniform * total)
    threshold = (tl.load(uniform_ptr + draw) * total.to(tl.float64)).to(tl.int64)
    chunk = tl.sum((tl.cumsum(masses, 0) <= threshold).to(tl.int32))
    chunk = tl.minimum(chunk, num_chunks - 1)
    threshold -= tl.sum(tl.where(chunks < chunk, masses, 0))
    ends = tl.cumsum(
        _chunk_masses(
            draw, logits_ptr + row * stride_row, chunk, temperature, largest, floor, cuts_ptr,
            num_filtered, vocab, CHUNK,
        ),
        0,
    )  # fmt: skip
    token = chunk * CHUNK + tl.sum((ends <= threshold).to(tl.int32))
    if total > 0:  # else the row has a NaN, and keeps its argmax
        tl.store(out_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))


@triton.jit(do_not_specialize=["num_chunks", "num_top"])
def score_chunks_kernel(
    logits_ptr,
    rows_ptr,
    chosen_ptr,
    largest_ptr,  # [num_scores, num_chunks] fp32
    sums_ptr,  # [num_scores, num_chunks] fp32
    larger_ptr,  # [num_scores, num_chunks] int32
    top_ptr,  # [num_scores, num_chunks, num_top] int64
    stride_row,
    vocab,
    num_chunks,
    num_top,
    CHUNK: tl.constexpr,
):
    """Of one chunk: max, sum(exp(x - max)), number of logits over the chosen one, best tokens."""
    chunk = tl.program_id(0)
    score = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + tl.load(rows_ptr + score) * stride_row
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
    of_chosen = tl.load(row_ptr + tl.load(chosen_ptr + score))
    largest = tl.max(x)
    place = score * num_chunks + chunk
    tl.store(largest_ptr + place, largest)
    tl.store(sums_ptr + place, tl.sum(tl.where(x == largest, 1.0, tl.exp(x - largest))))
    tl.store(larger_ptr + place, tl.sum((x > of_chosen).to(tl.int32)))
    ranked = _ranked(x, token)
    for n in range(num_top):
        best = tl.max(ranked)
        ranked = tl.where(ranked == best, LOWEST, ranked)
        tl.store(top_ptr + place * num_top + n, best)


@triton.jit(do_not_specialize=["num_chunks", "num_top"])
def score_rows_kernel(
    logits_ptr,
    rows_ptr,
    chosen_ptr,
    largest_ptr,
    sums_ptr,
    larger_ptr,
    top_ptr,
    ids_ptr,  # [num_scores, 1 + num_top] int64
    logprobs_ptr,  # [num_scores, 1 + num_top] fp32
    rank_ptr,  # [num_scores] int64
    stride_row,
    num_chunks,
    num_top,
    CHUNKS: tl.constexpr,
    TOPS: tl.constexpr,  # at least num_chunks * num_top
):
    """logprob = (x - max) - log(sum(exp(x - max))), for the chosen token and the best ones."""
    score = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    place = score * num_chunks + chunk
    mask = chunk < num_chunks
    largest_of_chunk = tl.load(largest_ptr + place, mask=mask, other=float("-inf"))
    sums = tl.load(sums_ptr + place, mask=mask, other=0.0)
    larger = tl.sum(tl.load(larger_ptr + place, mask=mask, other=0))
    largest = tl.max(largest_of_chunk)
    # a chunk of -inf alone says sum 1 for each of its tokens
    sums = tl.where(
        largest_of_chunk > float("-inf"), sums * tl.exp(largest_of_chunk - largest), 0.0
    )
    log_total = tl.log(tl.sum(sums))
    chosen = tl.load(chosen_ptr + score)
    of_chosen = tl.load(logits_ptr + tl.load(rows_ptr + score) * stride_row + chosen)
    first = score * (1 + num_top)
    tl.store(ids_ptr + first, chosen)
    tl.store(logprobs_ptr + first, of_chosen - largest - log_total)
    tl.store(rank_ptr + score, (larger + 1).to(tl.int64))
    top = tl.arange(0, TOPS)
    tops = top_ptr + score * num_chunks * num_top + top
    ranked = tl.load(tops, mask=top < num_chunks * num_top, other=LOWEST)
    for n in range(num_top):
        best = tl.max(ranked)
        ranked = tl.where(ranked == best, LOWEST, ranked)
        tl.store(ids_ptr + first + 1 + n, _token(best))
        x = _value((best >> 32).to(tl.int32))
        tl.store(logprobs_ptr + first + 1 + n, x - largest - log_total)


@triton.jit
def penalties_kernel(
    logits_ptr,
    rows_ptr,
    counts_ptr,  # [num_slots, vocab] int32
    slots_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    stride_row,
    vocab,
    CHUNK: tl.constexpr,
):
    """Penalise the tokens of one chunk that have been seen."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    penalized = tl.program_id(1)
    counts = counts_ptr + tl.load(slots_ptr + penalized) * vocab + token
    count = tl.load(counts, mask=token < vocab, other=0)
    x_ptrs = logits_ptr + tl.load(rows_ptr + penalized) * stride_row + token
    x = tl.load(x_ptrs, mask=count > 0, other=0.0)
    output = (count >> 1).to(tl.float32)
    repetition = tl.load(repetition_ptr + penalized)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x -= tl.load(frequency_ptr + penalized) * output
    x -= tl.where(output > 0, tl.load(presence_ptr + penalized), 0.0)
    tl.store(x_ptrs, x, mask=count > 0)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    counts: Tensor,
    slots: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """See `headrace.ops.sampling.apply_penalties`; the same bits as its reference."""
    _check_logits(logits)
    num, vocab = len(rows), logits.shape[1]
    if counts.dtype != torch.int32 or counts.shape[1:] != (vocab,) or not counts.is_contiguous():
        raise ValueError(
            f"counts must be contiguous int32 [slots, {vocab}]; got {_described(counts)}"
        )
    columns = {"slots": slots, "rows": rows}
    _check_columns(num, columns, torch.int64)
    columns = {"repetition": repetition, "frequency": frequency, "presence": presence}
    _check_columns(num, columns, torch.float32)
    if num == 0:
        return
    penalties_kernel[(triton.cdiv(vocab, CHUNK), num)](
        logits, rows, counts, slots, repetition, frequency, presence, logits.stride(0), vocab,
        CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def sample(
    logits: Tensor,
    draws: Draws | None,
    uniform: Tensor | None,
    out: Tensor,
    buffers: SamplingBuffers | None,
) -> Tensor:
    """See `headrace.ops.sampling.sample`.

    Its sums are floats: one that all but equals top_p may end otherwise.
    """
    _check_logits(logits)
    num_rows, vocab = logits.shape
    _check_columns(num_rows, {"out": out}, torch.int64)
    if buffers is None:
        buffers = sampling_buffers(fresh(logits.device), num_rows, vocab)
    num_chunks = triton.cdiv(vocab, CHUNK)
    room = buffers.best.shape
    if room[0] < num_rows or room[1] != num_chunks:
        raise ValueError(
            f"buffers are for {room[0]} rows of {room[1]} chunks; logits {tuple(logits.shape)} "
            f"need {num_rows} of {num_chunks}"
        )
    if num_rows == 0:
        return out
    best_kernel[(num_chunks, num_rows)](
        logits, buffers.best, logits.stride(0), vocab, num_chunks, CHUNK=CHUNK, num_warps=4
    )
    chunks = triton.next_power_of_2(num_chunks)
    argmax_kernel[(num_rows,)](
        buffers.best, buffers.largest, out, num_chunks, CHUNKS=chunks, num_warps=1
    )
    if draws is not None and len(draws.rows):
        _draw(logits, draws, _checked(draws, uniform, num_rows), out, buffers)
    return out


def _draw(
    logits: Tensor, draws: Draws, uniform: Tensor, out: Tensor, buffers: SamplingBuffers
) -> None:
    """Replace the tokens of draws.rows."""
    vocab, num_draws, num_filtered = logits.shape[1], len(draws.rows), draws.num_filtered
    num_chunks = triton.cdiv(vocab, CHUNK)
    shape = logits.stride(0), vocab, num_chunks
    sizes = {"CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(num_chunks)}
    row = logits, draws.rows, draws.temperature, draws.log_min_p
    if num_filtered:
        measured = (
            *row, draws.top_k, draws.top_p, buffers.largest,
            buffers.level_counts, buffers.level_masses,
        )  # fmt: skip
        for finer in (False, True):
            levels_kernel[(num_chunks, num_filtered)](
                *measured, *shape, FINER=finer, **sizes, num_warps=8
            )
        candidates_kernel[(num_chunks, num_filtered)](
            *measured, buffers.candidates, *shape, **sizes, num_warps=8
        )
        search_kernel[(num_filtered,)](
            *measured, buffers.candidates, buffers.cuts, *shape, CHUNKS=sizes["CHUNKS"],
            BLOCK=2048, PIVOTS=8, num_warps=8,
        )  # fmt: skip
    drawn = *row, buffers.largest, buffers.cuts, buffers.masses
    masses_kernel[(num_chunks, num_draws)](*drawn, *shape, num_filtered, CHUNK=CHUNK, num_warps=4)
    draw_kernel[(num_draws,)](*drawn, uniform, out, *shape, num_filtered, **sizes, num_warps=8)


def top_logprobs(
    logits: Tensor, rows: Tensor, chosen: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `headrace.ops.sampling.top_logprobs`; equal logits rank by token id.

    Allocates: not for a CUDA graph.
    """
    _check_logits(logits)
    if not 0 <= num_top <= MAX_TOP:
        raise ValueError(f"num_top is {num_top}; it must be 0 to {MAX_TOP}")
    num, vocab = len(rows), logits.shape[1]
    _check_columns(num, {"rows": rows, "chosen": chosen}, torch.int64)
    num_chunks = triton.cdiv(vocab, CHUNK)
    take = fresh(logits.device)
    ids = take((num, 1 + num_top), torch.int64)
    logprobs = take((num, 1 + num_top), torch.float32)
    rank = take((num,), torch.int64)
    if num == 0:
        return ids, logprobs, rank
    partial = (
        take((num, num_chunks), torch.float32),
        take((num, num_chunks), torch.float32),
        take((num, num_chunks), torch.int32),
        take((num, num_chunks, num_top), torch.int64),
    )
    stride = logits.stride(0)
    score_chunks_kernel[(num_chunks, num)](
        logits, rows, chosen, *partial, stride, vocab, num_chunks, num_top,
        CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    chunks = triton.next_power_of_2(num_chunks)
    score_rows_kernel[(num,)](
        logits, rows, chosen, *partial, ids, logprobs, rank, stride, num_chunks, num_top,
        CHUNKS=chunks, TOPS=chunks * MAX_TOP, num_warps=4,
    )  # fmt: skip
    return ids, logprobs, rank


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"


def _check_logits(logits: Tensor) -> None:
    if logits.dtype != torch.float32 or logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be float32 [rows, vocab], rows whole; got {_described(logits)}"
        )
    if not 0 < logits.shape[1] <= 2**18:
        raise ValueError(f"logits have {logits.shape[1]} columns; 1 to 2**18 fit the sums")


def _check_columns(num: int, columns: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, column in columns.items():
        if column.shape != (num,) or column.dtype != dtype or not column.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} [{num}]; got {_described(column)}")


def _checked(draws: Draws, uniform: Tensor | None, num_rows: int) -> Tensor:
    """`uniform`, after all checks of a draw's arguments."""
    num = len(draws.rows)
    if uniform is None:
        raise ValueError(f"uniform is None; {num} draws need a random number each")
    if num > num_rows or not 0 <= draws.num_filtered <= num:
        raise ValueError(f"{num} draws, {draws.num_filtered} filtered, of {num_rows} rows")
    _check_columns(num, {"rows": draws.rows}, torch.int64)
    _check_columns(num, {"top_k": draws.top_k}, torch.int32)
    _check_columns(num, {"uniform": uniform}, torch.float64)
    floats = {
        "temperature": draws.temperature, "log_min_p": draws.log_min_p, "top_p": draws.top_p
    }  # fmt: skip
    _check_columns(num, floats, torch.float32)
    return uniform
