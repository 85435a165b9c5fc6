# mypy: disable-error-code="no-untyped-def"
"""Dense linear layers on the GPU, with the weights as the tall side of each product.

A row of the result has the same bits whatever the number of tokens: every element is one chain of
the same matrix instruction over K, 16 columns after the other, whatever the tile.

With few tokens all SMs should read weights, but the instruction is 64 rows tall: out_features of
2880 would keep 45 SMs busy. So a program may own fewer rows of the weight than its tile has; the
others are zeros that nothing is read for. That spares the split of K and its second pass, and the
arithmetic wasted costs nothing where memory is the limit.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.ops import dispatch
from headrace.ops.checks import check_gpu_dtype
from headrace.ops.linear import check
from headrace.ops.linear_tiles import LinearProblem, LinearTile, choose


@triton.jit
def _block_of_tile(tile, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Its blocks of tokens and of rows: GROUP_M blocks of tokens go through all rows together."""
    group = tile // (blocks_n * GROUP_M)
    group_blocks = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    in_group = tile - group * blocks_n * GROUP_M
    return group * GROUP_M + in_group % group_blocks, in_group // group_blocks


@triton.jit
def _compute_tile(
    block_m,
    block_n,
    x_ptr,
    weight_ptr,
    x_desc,
    weight_desc,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    out_features,
    in_features,
    EVEN_K: tl.constexpr,
    TERMS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token, row = block_m * BLOCK_M, block_n * ROWS
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n_mask = n < tl.minimum(ROWS, out_features - row)
    m_mask = m < num_tokens - token
    mask = n_mask[:, None] & m_mask[None, :]
    place = (token + m).to(tl.int64)[None, :] * out_features + (row + n)[:, None]
    if TERMS_FIRST and bias_ptr is not None:
        bias = tl.load(bias_ptr + row + n, mask=n_mask, other=0.0)
    if TERMS_FIRST and residual_ptr is not None:
        residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
    w_ptrs = weight_ptr + row.to(tl.int64) * in_features + n[:, None] * in_features + k[None, :]
    x_ptrs = x_ptr + token.to(tl.int64) * in_features + m[None, :] * in_features + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        if x_desc is not None:
            if ROWS < BLOCK_N:
                w = weight_desc.load([block_n, 0, start]).reshape(BLOCK_N, BLOCK_K)
            else:
                w = weight_desc.load([row, start])
            x = x_desc.load([token, start]).T
        elif EVEN_K:
            w = tl.load(w_ptrs + start, mask=n_mask[:, None], other=0.0)
            x = tl.load(x_ptrs + start, mask=m_mask[None, :], other=0.0)
        else:
            in_k = k < in_features - start
            w = tl.load(w_ptrs + start, mask=n_mask[:, None] & in_k[None, :], other=0.0)
            x = tl.load(x_ptrs + start, mask=m_mask[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if bias_ptr is not None:
        if not TERMS_FIRST:
            bias = tl.load(bias_ptr + row + n, mask=n_mask, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    if residual_ptr is not None:
        if not TERMS_FIRST:
            residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features]
    x_desc,  # TMA descriptors of both, or None; of the weight [out_features / ROWS, ROWS,
    weight_desc,  # in_features] if ROWS < BLOCK_N: a row past ROWS is out of its bounds, so zero
    bias_ptr,  # [out_features], or None
    residual_ptr,  # [num_tokens, out_features], or None
    out_ptr,  # [num_tokens, out_features]; may be residual
    num_tokens,
    out_features,
    in_features,
    EVEN_K: tl.constexpr,  # BLOCK_K divides in_features
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before has ended, and lets the next
    PERSISTENT: tl.constexpr,  # a program computes tile after tile
    BLOCK_M: tl.constexpr,  # tokens
    BLOCK_N: tl.constexpr,  # height of the tile
    ROWS: tl.constexpr,  # rows of the weight in it
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # blocks of tokens that share weights while they are in L2
):
    """out[m, n] = sum_k w[n, k] x[m, k] + bias[n] + residual[m, n]: tiles of BLOCK_M x ROWS."""
    blocks_m = tl.cdiv(num_tokens, BLOCK_M)
    blocks_n = tl.cdiv(out_features, ROWS)
    block_m, block_n = _block_of_tile(tl.program_id(0), blocks_m, blocks_n, GROUP_M)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # not sooner: beside it `add_lora` reads x, without a wait
    if PERSISTENT:
        # flattened: the first loads of a tile are under way while the one before it is stored
        for tile in tl.range(
            tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True
        ):
            block_m, block_n = _block_of_tile(tile, blocks_m, blocks_n, GROUP_M)
            _compute_tile(
                block_m, block_n, x_ptr, weight_ptr, x_desc, weight_desc, bias_ptr, residual_ptr,
                out_ptr, num_tokens, out_features, in_features, EVEN_K, False,
                BLOCK_M, BLOCK_N, ROWS, BLOCK_K,
            )  # fmt: skip
    else:
        # bias and residual before all else, where registers allow: at the end, the wait for
        # memory would show
        _compute_tile(
            block_m, block_n, x_ptr, weight_ptr, x_desc, weight_desc, bias_ptr, residual_ptr,
            out_ptr, num_tokens, out_features, in_features, EVEN_K, BLOCK_M <= 32,
            BLOCK_M, BLOCK_N, ROWS, BLOCK_K,
        )  # fmt: skip


def linear(
    x: Tensor,  # [num_tokens, in_features] bf16
    weight: Tensor,  # [out_features, in_features] bf16
    bias: Tensor | None,  # [out_features]
    residual: Tensor | None,  # [num_tokens, out_features]
    out: Tensor,  # [num_tokens, out_features]; may be residual
    tile: LinearTile | None = None,
) -> Tensor:
    """out = x W^T + b + residual, summed in float32 in this order and rounded once.

    Raises ValueError for shapes and dtypes that do not fit and tensors that are not contiguous.
    """
    check(x, weight, bias, residual, out)
    _check_memory(x=x, weight=weight, bias=bias, residual=residual, out=out)
    check_gpu_dtype(x)
    if len(x) == 0:
        return out
    tile = tile or choose(_problem(x, weight))
    x_desc, weight_desc = _descriptors(x, weight, tile) if tile.tma else (None, None)
    tiles = triton.cdiv(len(x), tile.block_m) * triton.cdiv(len(weight), tile.rows)
    early = dispatch.is_hopper(x)
    linear_kernel[(min(tiles, tile.programs or tiles),)](
        x,
        weight,
        x_desc,
        weight_desc,
        bias,
        residual,
        out,
        len(x),
        *weight.shape,
        EVEN_K=weight.shape[1] % tile.block_k == 0,
        EARLY=early,
        PERSISTENT=tile.programs > 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        ROWS=tile.rows,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=early,
    )
    return out


def _descriptors(
    x: Tensor, weight: Tensor, tile: LinearTile
) -> tuple[TensorDescriptor, TensorDescriptor]:
    x_desc = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
    if tile.rows == tile.block_n:
        return x_desc, TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    shares = weight.view(-1, tile.rows, weight.shape[1])
    return x_desc, TensorDescriptor.from_tensor(shares, [1, tile.block_n, tile.block_k])


def _problem(x: Tensor, weight: Tensor) -> LinearProblem:
    problem = LinearProblem(len(x), weight.shape[0], weight.shape[1])
    if not x.is_cuda:
        return problem
    gpu = dispatch.gpu_limits(x.device.index)
    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    return replace(
        problem,
        num_sms=gpu.num_sms,
        shared_memory=gpu.shared_memory,
        has_tma=aligned and dispatch.is_hopper(x),
    )


def _check_memory(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; pass a contiguous tensor")
