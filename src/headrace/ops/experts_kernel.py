# mypy: disable-error-code="no-untyped-def"
"""The expert matmuls on the GPU: rows sorted by expert, weights as the tall side of each product.

One instruction kind and one order over K, whatever the number of tokens: a token's result has the
same bits in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.ops.experts import Activation
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


@triton.jit(do_not_specialize=["num_blocks", "weight_factor", "alpha", "limit"])
def grouped_matmul_kernel(
    x_ptr,  # [rows, in_features]
    weight_ptr,  # words of PreparedMXFP4, or [num_experts, out_features, in_features]
    scales_ptr,
    bias_ptr,  # [num_experts, out_features]
    out_ptr,  # [num_slots, out columns]
    slots_ptr,  # [num_slots] int32: slot (token * TOP_K + k) of each sorted row
    blocks_ptr,  # [num_blocks, 4] int32: expert (-1: none), first row, end row
    slot_weights_ptr,  # [num_slots] float32
    slot_of_token_ptr,  # [num_tokens] int32: the adapter of each token
    parts_ptr,  # [NUM_PARTS, 1, num_slots, max_rank] float32
    memory_ptr,
    b_ptr,  # [1, adapters] int64, and so the next two
    rank_ptr,
    scale_ptr,
    part_stride,
    max_rank,
    num_blocks,
    out_features,
    in_features,
    out_stride,
    weight_factor,  # 2 ** exponent
    alpha,
    limit,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,  # x has one row per token, else one per sorted row
    SCATTER: tl.constexpr,  # out row = slot and times the slot's weight, else the sorted row
    ACTIVATION: tl.constexpr,
    ROW_ORDER: tl.constexpr,
    MXFP4: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,  # sorted rows (tokens)
    BLOCK_N: tl.constexpr,  # rows of the weight
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # blocks of rows that share a weight tile while it is in L2
    LORA: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[row, n] = f(sum_k w[n, k] x[row, k] + delta[row, n] + bias[n]).

    One block of rows, BLOCK_N of n.
    """
    TILES_PER_N: tl.constexpr = BLOCK_N // 64
    UNITS_K: tl.constexpr = BLOCK_K // 64
    tiles_n = tl.cdiv(out_features, 64)
    programs_n = tl.cdiv(tiles_n, TILES_PER_N)
    pid = tl.program_id(0)
    group = pid // (programs_n * GROUP_M)
    group_rows = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    in_group = pid - group * programs_n * GROUP_M
    block = group * GROUP_M + in_group % group_rows
    pid_n = in_group // group_rows
    expert = tl.load(blocks_ptr + block * 4)
    if expert < 0:
        return
    row = tl.load(blocks_ptr + block * 4 + 1) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(blocks_ptr + block * 4 + 2)
    slot = tl.load(slots_ptr + row, mask=row_mask, other=0)
    source = slot // TOP_K if GATHER else row
    if LORA:
        adapter = adapters_of_rows(slot_of_token_ptr, slot // TOP_K, row_mask)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source[None, :].to(tl.int64) * in_features + offs_k[:, None]

    tile_n = pid_n * TILES_PER_N + tl.arange(0, TILES_PER_N)
    steps = tl.cdiv(in_features, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if MXFP4:
        # a tile past the end reads the last one again: its rows are masked when stored
        tile = expert.to(tl.int64) * tiles_n + tl.minimum(tile_n, tiles_n - 1)
        tiles_k = tl.cdiv(in_features, 128)
        first_word = (tile * tiles_k * 1024)[:, None, None]
        unit = tl.arange(0, UNITS_K)[None, :, None]
        word_ptrs = weight_ptr + first_word + unit * 512 + tl.arange(0, 512)[None, None, :]
        first_scale = (tile * tiles_k * 64)[:, None, None]
        half = tl.arange(0, UNITS_K // 2)[None, :, None]
        scale_ptrs = scales_ptr + first_scale + half * 64 + tl.arange(0, 64)[None, None, :]
        for step in range(steps):
            if UNITS_K == 2:
                words = tl.load(word_ptrs)
                scales = tl.load(scale_ptrs)
            else:
                unit_mask = unit < tiles_k * 2 - step * UNITS_K
                words = tl.load(word_ptrs, mask=unit_mask, other=0)
                half_mask = half < tiles_k - step * (UNITS_K // 2)
                scales = tl.load(scale_ptrs, mask=half_mask, other=0)
            in_k = offs_k[:, None] < in_features - step * BLOCK_K
            x = tl.load(x_ptrs, mask=in_k & row_mask[None, :], other=0.0)
            w = decode_tile(words, scales, TILES_PER_N, UNITS_K, x_ptr.dtype.element_ty, PTX)
            acc = tl.dot(w, x, acc, input_precision="ieee")
            word_ptrs += UNITS_K * 512
            scale_ptrs += UNITS_K // 2 * 64
            x_ptrs += BLOCK_K
        acc *= weight_factor
    else:
        tile_row = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row = _rows_of_tile(tile_row, out_features, ROW_ORDER)
        weight_row = tl.minimum(weight_row, out_features - 1)
        first = expert.to(tl.int64) * out_features * in_features
        w_ptrs = weight_ptr + first + weight_row[:, None] * in_features + offs_k[None, :]
        for step in range(steps):
            left = in_features - step * BLOCK_K
            x = tl.load(x_ptrs, mask=(offs_k[:, None] < left) & row_mask[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=offs_k[None, :] < left, other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
            w_ptrs += BLOCK_K
            x_ptrs += BLOCK_K

    if LORA:
        column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if ROW_ORDER == 2:
            column = _rows_of_tile(column, out_features, ROW_ORDER)
        acc = add_low_rank(
            acc, adapter, slot, column, expert, parts_ptr, part_stride, max_rank, memory_ptr,
            b_ptr, rank_ptr, scale_ptr, out_features, NUM_PARTS, BLOCK_R, ROW_ORDER == 1,
        )  # fmt: skip
    bias_ptr += expert * out_features
    out_row = slot if SCATTER else row
    out_ptrs = out_ptr + out_row.to(tl.int64)[None, :] * out_stride
    if ACTIVATION == 0:
        tile_row = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n = _rows_of_tile(tile_row, out_features, ROW_ORDER)
        n_mask = n < out_features
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
        if SCATTER:
            acc *= tl.load(slot_weights_ptr + slot, mask=row_mask, other=0.0)[None, :]
    else:
        pairs = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
        gate, up = tl.split(pairs)
        gate = gate.reshape(BLOCK_N // 2, BLOCK_M)
        up = up.reshape(BLOCK_N // 2, BLOCK_M)
        n = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        n_mask = n < out_features // 2
        gate_row = 2 * n if ROW_ORDER == 1 else n
        up_row = 2 * n + 1 if ROW_ORDER == 1 else n + out_features // 2
        gate += tl.load(bias_ptr + gate_row, mask=n_mask, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + up_row, mask=n_mask, other=0.0).to(tl.float32)[:, None]
        acc = _activate(gate, up, alpha, limit, ACTIVATION)
    tl.store(out_ptrs + n[:, None], acc.to(out_ptr.dtype.element_ty), n_mask[:, None] & row_mask)


@triton.jit(do_not_specialize=["first_expert", "num_local"])
def weighted_sum_kernel(
    y_ptr,  # [num_tokens * TOP_K, hidden], already times the routing weights
    expert_ids_ptr,  # [num_tokens, TOP_K] int32
    residual_ptr,  # [num_tokens, hidden]
    out_ptr,  # [num_tokens, hidden]
    hidden,
    first_expert,
    num_local,
    TOP_K: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = residual[t] + sum_k y[t, k], k rising; skips slots of experts not held here."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        local = tl.load(expert_ids_ptr + token * TOP_K + k) - first_expert
        held = (local >= 0) & (local < num_local)
        y = tl.load(y_ptr + (token * TOP_K + k) * hidden + column, mask=mask & held, other=0.0)
        total += y.to(tl.float32)
    if ADD_RESIDUAL:
        total += tl.load(residual_ptr + token * hidden + column, mask=mask).to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=mask)


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

    delta is what `low_rank` adds, from `shrink_experts` of the same x and slots.

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
    num_blocks = slots.blocks.shape[0]
    grid = (num_blocks * triton.cdiv(weight.out_features, tile.block_n),)
    grouped_matmul_kernel[grid](
        x,
        values,
        scales,
        bias,
        out,
        slots.slots,
        slots.blocks,
        bias if slot_weights is None else slot_weights,
        *_low_rank_arguments(low_rank),
        num_blocks,
        weight.out_features,
        weight.in_features,
        out.stride(0),
        factor,
        alpha,
        limit,
        TOP_K=top_k,
        GATHER=gather,
        SCATTER=slot_weights is not None,
        ACTIVATION=int(activation),
        ROW_ORDER=int(weight.row_order),
        MXFP4=isinstance(weight, PreparedMXFP4),
        PTX=x.is_cuda,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        LORA=low_rank is not None,
        NUM_PARTS=0 if low_rank is None else len(low_rank.parts),
        BLOCK_R=0 if low_rank is None else rank_tile(low_rank.parts.shape[3], tile.block_m),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def weighted_sum(
    y: Tensor,  # [num_tokens * top_k, hidden]
    expert_ids: Tensor,  # [num_tokens, top_k] int32
    local: range,  # experts held here
    residual: Tensor | None,  # [num_tokens, hidden]
    out: Tensor,  # [num_tokens, hidden]
) -> Tensor:
    """out[t] = residual[t] + sum_k y[t, k], in float32 and in the order of k."""
    num_tokens, hidden = out.shape
    if num_tokens:
        weighted_sum_kernel[(num_tokens, triton.cdiv(hidden, 1024))](
            y,
            expert_ids,
            out if residual is None else residual,
            out,
            hidden,
            local.start,
            len(local),
            TOP_K=expert_ids.shape[1],
            ADD_RESIDUAL=residual is not None,
            BLOCK=1024,
            num_warps=4,
        )
    return out


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
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f"x is {x.dtype}; pass bfloat16")
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


def _low_rank_arguments(low_rank: LowRank | None) -> tuple[Tensor | int | None, ...]:
    if low_rank is None:
        return (None,) * 8
    site, parts = low_rank.site, low_rank.parts
    return (
        low_rank.slot_of_token, parts, low_rank.memory, site.b, site.rank, site.scale,
        parts.stride(0), parts.shape[3],
    )  # fmt: skip


def _check_low_rank(low_rank: LowRank, weight: KernelWeight, num_slots: int) -> None:
    site, parts = low_rank.site, low_rank.parts
    found = (site.in_features, site.widths, site.num_experts, parts.shape[2])
    wanted = (weight.in_features, (weight.out_features,), weight.num_experts, num_slots)
    if found != wanted:
        raise ValueError(
            f"low_rank has (in_features, widths, num_experts, rows) {found}; the weight and the "
            f"slots need {wanted}"
        )
