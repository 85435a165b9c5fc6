# mypy: disable-error-code="no-untyped-def"
"""The expert matmuls on the GPU: rows sorted by expert, weights as the tall side of each product.

One instruction kind and one order over K, whatever the number of tokens: a token's result has the
same bits in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops import dispatch
from headrace.ops.checks import check_gpu_dtype
from headrace.ops.experts import Activation
from headrace.ops.lora_experts_kernel import shrink_block, shrink_programs, wait_for_shrink
from headrace.ops.lora_kernel import LowRank, adapters_of_rows, add_low_rank, rank_tile
from headrace.ops.mxfp4_kernel import PreparedMXFP4, RowOrder, decode_tile
from headrace.ops.routing import SortedSlots
from headrace.ops.tiles import Tile


@dataclass(frozen=True)
class DenseWeight:
    """A bfloat16 weight in checkpoint layout, for the same kernel."""

    values: Tensor  # [num_experts, out_features, in_features]
    row_order: RowOrder

    @property
    def num_experts(self) -> int:
        """Experts held."""
        return self.values.shape[0]

    @property
    def out_features(self) -> int:
        """Rows of an expert."""
        return self.values.shape[1]

    @property
    def in_features(self) -> int:
        """Columns of an expert."""
        return self.values.shape[2]


KernelWeight = PreparedMXFP4 | DenseWeight


@triton.jit
def _rows_of_tile(
    tile_row, out_features, ROW_ORDER: tl.constexpr
):  # checkpoint row of each row of the tiles, as row_map has it
    if ROW_ORDER == 0:
        return tile_row
    second = tile_row // 8 % 2
    pair = tile_row // 16 * 8 + tile_row % 8
    row = 2 * pair + second if ROW_ORDER == 1 else pair + second * (out_features // 2)
    return tl.where(pair < out_features // 2, row, out_features)


@triton.jit
def _activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    if ACTIVATION == 2:
        return gate * tl.sigmoid(gate) * up
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate * tl.sigmoid(alpha * gate) * (up + 1.0)


@triton.jit
def _wait_for_products(step):
    """Until the matrix instructions under way have read their registers.

    ptxas gives those of decoded weights to what comes next once the instruction is issued, and with
    adapters even those of the last one: wrong values in 5 to 30 of 1024 rows at rank 16. Without
    adapters a younger instruction stands between (tests/ops/test_experts_compile.py): then nothing
    was ever wrong, and the wait would take 4 % of the layer from 512 tokens on. With adapters it
    takes 1 to 4 (bench/results/h100/lora_wait.csv).
    """
    tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;", "=r,r", [step],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _mxfp4_product(
    x_ptrs,  # [BLOCK_K, BLOCK_M]
    row_mask,
    weight_ptr,
    scales_ptr,
    expert,
    tile_n,  # [BLOCK_N / 64]
    out_features,
    in_features,
    PTX: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W x, [BLOCK_N, BLOCK_M] float32, too small by 2 ** exponent."""
    TILES_N: tl.constexpr = tile_n.shape[0]
    UNITS_K: tl.constexpr = BLOCK_K // 64
    offs_k = tl.arange(0, BLOCK_K)
    tiles_n = tl.cdiv(out_features, 64)
    tiles_k = tl.cdiv(in_features, 128)
    # a tile past the end reads the last one again: its rows are masked when stored
    tile = expert.to(tl.int64) * tiles_n + tl.minimum(tile_n, tiles_n - 1)
    first_word = (tile * tiles_k * 1024)[:, None, None]
    unit = tl.arange(0, UNITS_K)[None, :, None]
    word_ptrs = weight_ptr + first_word + unit * 512 + tl.arange(0, 512)[None, None, :]
    first_scale = (tile * tiles_k * 64)[:, None, None]
    half = tl.arange(0, UNITS_K // 2)[None, :, None]
    scale_ptrs = scales_ptr + first_scale + half * 64 + tl.arange(0, 64)[None, None, :]
    acc = tl.zeros([TILES_N * 64, BLOCK_M], tl.float32)
    # one step or more, as the compiler should know: sums that may also be the zeros of no step kept
    # it from having more than one matrix instruction under way (128 x 128 with 4 warps)
    for step in range(tl.maximum(tl.cdiv(in_features, BLOCK_K), 1)):
        if UNITS_K == 2:
            words = tl.load(word_ptrs)
            scales = tl.load(scale_ptrs)
        else:
            words = tl.load(word_ptrs, mask=unit < tiles_k * 2 - step * UNITS_K, other=0)
            in_scales = half < tiles_k - step * (UNITS_K // 2)
            scales = tl.load(scale_ptrs, mask=in_scales, other=0)
        in_k = offs_k[:, None] < in_features - step * BLOCK_K
        x = tl.load(x_ptrs, mask=in_k & row_mask[None, :], other=0.0)
        w = decode_tile(words, scales, TILES_N, UNITS_K, x.dtype, PTX)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if WAIT:
            _wait_for_products(step)
        word_ptrs += UNITS_K * 512
        scale_ptrs += UNITS_K // 2 * 64
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def _dense_product(
    x_ptrs,  # [BLOCK_K, BLOCK_M]
    row_mask,
    weight_ptr,  # [num_experts, out_features, in_features]
    expert,
    weight_row,  # [BLOCK_N]
    out_features,
    in_features,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W x, [BLOCK_N, BLOCK_M] float32."""
    offs_k = tl.arange(0, BLOCK_K)
    weight_row = tl.minimum(weight_row, out_features - 1)
    first = expert.to(tl.int64) * out_features * in_features
    w_ptrs = weight_ptr + first + weight_row[:, None] * in_features + offs_k[None, :]
    acc = tl.zeros([weight_row.shape[0], BLOCK_M], tl.float32)
    for step in range(tl.cdiv(in_features, BLOCK_K)):
        left = in_features - step * BLOCK_K
        x = tl.load(x_ptrs, mask=(offs_k[:, None] < left) & row_mask[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=offs_k[None, :] < left, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def _block_of_rows(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    slots_ptr,
    slot_weights_ptr,
    blocks_ptr,
    block,
    expert,
    first_row,
    end_row,
    pid_n,
    out_features,
    in_features,
    out_stride,
    weight_factor,
    alpha,
    limit,
    slot_of_token_ptr,
    u_ptr,
    memory_ptr,
    b_ptr,
    rank_ptr,
    scale_ptr,
    max_rank,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROW_ORDER: tl.constexpr,
    MXFP4: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LORA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SHRINKS: tl.constexpr,
    BESIDE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What grouped_matmul_kernel does, for BLOCK_M sorted rows or fewer of one expert."""
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < end_row
    CACHE: tl.constexpr = ".cg" if BESIDE else ""  # no wait has emptied L1
    slot = tl.load(slots_ptr + row, mask=row_mask, other=0, cache_modifier=CACHE)
    source = slot // TOP_K if GATHER else row
    if LORA:
        adapter = adapters_of_rows(slot_of_token_ptr, slot // TOP_K, row_mask)
    tile_row = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = _rows_of_tile(tile_row, out_features, ROW_ORDER)
    # before the product, where registers allow: at the end, the wait for memory would show
    bias_ptrs = bias_ptr + expert * out_features + n
    if BLOCK_M <= 64:
        bias = tl.load(bias_ptrs, mask=n < out_features, other=0.0)
        if SCATTER:
            slot_weight = tl.load(
                slot_weights_ptr + slot, mask=row_mask, other=0.0, cache_modifier=CACHE
            )
    k = tl.arange(0, BLOCK_K)[:, None]
    x_ptrs = x_ptr + source[None, :].to(tl.int64) * in_features + k
    if MXFP4:
        tile_n = pid_n * (BLOCK_N // 64) + tl.arange(0, BLOCK_N // 64)
        acc = _mxfp4_product(
            x_ptrs, row_mask, weight_ptr, scales_ptr, expert, tile_n, out_features,
            in_features, PTX, EARLY and LORA, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        acc *= weight_factor
    else:
        acc = _dense_product(
            x_ptrs, row_mask, weight_ptr, expert, n, out_features, in_features,
            BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    if LORA:
        column = n if ROW_ORDER == 2 else tile_row
        if SHRINKS > 0:
            wait_for_shrink(blocks_ptr, block, adapter, SHRINKS, GATHER)
        if BESIDE:
            gdc_wait()
        acc = add_low_rank(
            acc, adapter, slot, column, expert, u_ptr, 0, max_rank, memory_ptr, b_ptr, rank_ptr,
            scale_ptr, out_features, 1, BLOCK_R, ROW_ORDER == 1, BESIDE or SHRINKS > 0,
        )  # fmt: skip
    if BLOCK_M > 64:
        bias = tl.load(bias_ptrs, mask=n < out_features, other=0.0)
        if SCATTER:
            slot_weight = tl.load(slot_weights_ptr + slot, mask=row_mask, other=0.0)
    acc += bias.to(tl.float32)[:, None]
    out_row = slot if SCATTER else row
    out_ptrs = out_ptr + out_row.to(tl.int64)[None, :] * out_stride
    if ACTIVATION == 0:
        n_mask = n < out_features
        if SCATTER:
            acc *= slot_weight[None, :]
    else:
        pairs = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
        gate, up = tl.split(pairs)
        gate = gate.reshape(BLOCK_N // 2, BLOCK_M)
        up = up.reshape(BLOCK_N // 2, BLOCK_M)
        n = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        n_mask = n < out_features // 2
        acc = _activate(gate, up, alpha, limit, ACTIVATION)
    rounded = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs + n[:, None], rounded, n_mask[:, None] & row_mask)


@triton.jit(do_not_specialize=["num_blocks", "weight_factor", "alpha", "limit"])
def grouped_matmul_kernel(
    x_ptr,  # [rows, in_features]
    weight_ptr,  # words of PreparedMXFP4, or [num_experts, out_features, in_features]
    scales_ptr,
    bias_ptr,  # [num_experts, out_features]
    out_ptr,  # [num_slots, out columns]
    slots_ptr,  # [num_slots] int32: slot (token * TOP_K + k) of each sorted row
    blocks_ptr,  # [num_blocks, 4] int32: expert (-1: none), first row, end row, arrivals
    slot_weights_ptr,  # [num_slots] float32
    num_blocks,
    out_features,
    in_features,
    out_stride,
    weight_factor,  # 2 ** exponent
    alpha,
    limit,
    # adapters, if LORA
    slot_of_token_ptr,  # [num_tokens] int32: the adapter of each token
    u_ptr,  # [1, 1, num_slots, max_rank]
    sums_ptr,  # of shrink_block
    sums_stride,
    memory_ptr,
    a_ptr,  # [1, adapters] int64, and so the next three
    b_ptr,
    rank_ptr,
    scale_ptr,
    max_rank,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,  # x has one row per token, else one per sorted row
    SCATTER: tl.constexpr,  # out row = slot and times the slot's weight, else the sorted row
    ACTIVATION: tl.constexpr,
    ROW_ORDER: tl.constexpr,
    MXFP4: tl.constexpr,
    PTX: tl.constexpr,
    WIDTHS: tl.constexpr,  # 0, then sorted rows (tokens) at once: a block has the first with room
    BLOCK_N: tl.constexpr,  # rows of the weight
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # blocks of rows that share a weight tile while it is in L2
    LORA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SHRINKS: tl.constexpr,  # programs of a block that fill u, before all others; 0: it is filled
    BESIDE: tl.constexpr,  # u is of the kernel before, which has waited for all else
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """out[row, n] = f(sum_k w[n, k] x[row, k] + delta[row, n] + bias[n]).

    One block of rows, BLOCK_N of n.
    """
    programs_n = tl.cdiv(out_features, BLOCK_N)
    pid = tl.program_id(0) - num_blocks * SHRINKS
    if SHRINKS > 0:  # noqa: SIM102 (Triton would evaluate both sides of an `and`)
        if pid < 0:
            if EARLY:
                gdc_wait()
                gdc_launch_dependents()
            shrink_block(
                x_ptr, slots_ptr, blocks_ptr, slot_of_token_ptr, u_ptr, sums_ptr, sums_stride,
                memory_ptr, a_ptr, rank_ptr, scale_ptr, in_features, max_rank, TOP_K, GATHER,
                WIDTHS[len(WIDTHS) - 1], SHRINKS,
            )  # fmt: skip
            return
    group = pid // (programs_n * GROUP_M)
    group_rows = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    in_group = pid - group * programs_n * GROUP_M
    block = group * GROUP_M + in_group % group_rows
    pid_n = in_group // group_rows
    if EARLY and not BESIDE:
        gdc_wait()
    CACHE: tl.constexpr = ".cg" if BESIDE else ""
    expert = tl.load(blocks_ptr + block * 4, cache_modifier=CACHE)
    first_row = tl.load(blocks_ptr + block * 4 + 1, cache_modifier=CACHE)
    end_row = tl.load(blocks_ptr + block * 4 + 2, cache_modifier=CACHE)
    if expert >= 0:
        rows = end_row - first_row
        for i in tl.static_range(1, len(WIDTHS)):
            if (rows > WIDTHS[i - 1]) & (rows <= WIDTHS[i]):
                _block_of_rows(
                    x_ptr, weight_ptr, scales_ptr, bias_ptr, out_ptr, slots_ptr, slot_weights_ptr,
                    blocks_ptr, block, expert, first_row, end_row, pid_n, out_features,
                    in_features, out_stride, weight_factor, alpha, limit, slot_of_token_ptr, u_ptr,
                    memory_ptr, b_ptr, rank_ptr, scale_ptr, max_rank, TOP_K, GATHER, SCATTER,
                    ACTIVATION, ROW_ORDER, MXFP4, PTX, WIDTHS[i], BLOCK_N, BLOCK_K, LORA, BLOCK_R,
                    SHRINKS, BESIDE, EARLY,
                )  # fmt: skip
    elif BESIDE:
        gdc_wait()


def grouped_matmul(
    x: Tensor,  # [num_tokens or num_slots, in_features] bf16
    weight: KernelWeight,
    bias: Tensor,  # [num_experts, out_features] bf16 or float32
    slots: SortedSlots,
    tile: Tile,
    out: Tensor,  # [num_slots, out_features or half of it]
    top_k: int,
    gather: bool,
    slot_weights: Tensor | None = None,  # [num_slots] float32; given: out rows are slots
    activation: Activation = Activation.NONE,
    alpha: float = 1.702,
    limit: float = 7.0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """out[row] = activation(W_e x[row] + delta[row] + b_e), times slot_weights if given.

    delta is what `low_rank` adds, from `shrink_experts` of the same x and slots, the launch before:
    this one starts beside it and waits for u at its end. For few rows this launch computes u too:
    then it may be called once with gather and once without after each sort.

    With gather, x has a row per token; otherwise a row per sorted slot, as a first call wrote it.
    """
    _check(x, weight, bias, out, slots, activation)
    if low_rank is not None:
        _check_low_rank(low_rank, weight, len(slots.slots))
    if out.shape[0] == 0:
        return out
    if isinstance(weight, PreparedMXFP4):
        values, scales, factor = weight.words, weight.scales, 2.0**weight.exponent
    else:
        values, scales, factor = weight.values, bias, 1.0  # scales unused
    early = dispatch.is_hopper(x)
    num_blocks = slots.blocks.shape[0]
    shrinks = shrink_programs(low_rank)
    # with nothing to fill, shrink_experts launches nothing
    beside = early and low_rank is not None and not shrinks and low_rank.u.numel() > 0
    # five programs of 96 registers on an SM: 98.5 us a layer at 4 tokens, 104 with four of 120
    # (bench/results/h100/lora_ways.csv)
    few = early and shrinks and (tile.block_m, tile.block_n) == (16, 64)
    grid = (num_blocks * (shrinks + triton.cdiv(weight.out_features, tile.block_n)),)
    grouped_matmul_kernel[grid](
        x,
        values,
        scales,
        bias,
        out,
        slots.slots,
        slots.blocks,
        slot_weights,
        num_blocks,
        weight.out_features,
        weight.in_features,
        out.stride(0),
        factor,
        alpha,
        limit,
        *_low_rank_arguments(low_rank),
        TOP_K=top_k,
        GATHER=gather,
        SCATTER=slot_weights is not None,
        ACTIVATION=int(activation),
        ROW_ORDER=int(weight.row_order),
        MXFP4=isinstance(weight, PreparedMXFP4),
        PTX=x.is_cuda,
        WIDTHS=(0, *tile.narrow, tile.block_m),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        LORA=low_rank is not None,
        BLOCK_R=0 if low_rank is None else rank_tile(low_rank.u, tile.block_m),
        SHRINKS=shrinks,
        BESIDE=beside,
        EARLY=early,
        maxnreg=96 if few else None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=early,
    )
    return out


Arguments = tuple[Tensor | int | None, ...]


def _low_rank_arguments(low_rank: LowRank | None) -> Arguments:
    if low_rank is None:
        return (None,) * 10
    site, u, sums = low_rank.site, low_rank.u, low_rank.sums
    return (
        low_rank.slot_of_token, u, sums, 0 if sums is None else sums.stride(0), low_rank.memory,
        site.a, site.b, site.rank, site.scale, u.shape[3],
    )  # fmt: skip


def _check(
    x: Tensor,
    weight: KernelWeight,
    bias: Tensor,
    out: Tensor,
    slots: SortedSlots,
    activation: Activation,
) -> None:
    columns = weight.out_features if activation == Activation.NONE else weight.out_features // 2
    if x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, strides {x.stride()}; the weight needs contiguous "
            f"[rows, {weight.in_features}]"
        )
    check_gpu_dtype(x)
    if tuple(bias.shape) != (weight.num_experts, weight.out_features) or not bias.is_contiguous():
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; the weight needs contiguous "
            f"{(weight.num_experts, weight.out_features)}"
        )
    if tuple(out.shape) != (len(slots.slots), columns) or out.stride(1) != 1:
        raise ValueError(
            f"out has shape {tuple(out.shape)}; this call needs {(len(slots.slots), columns)}"
        )
    if activation != Activation.NONE and weight.row_order == RowOrder.PLAIN:
        raise ValueError("activation needs a weight prepared with a row_order that pairs its rows")


def _check_low_rank(low_rank: LowRank, weight: KernelWeight, num_slots: int) -> None:
    site = low_rank.site
    found = (site.in_features, site.widths, site.num_experts, low_rank.u.shape[2])
    wanted = (weight.in_features, (weight.out_features,), weight.num_experts, num_slots)
    if found != wanted:
        raise ValueError(
            f"low_rank has (in_features, widths, num_experts, rows) {found}; the weight and the "
            f"slots need {wanted}"
        )
