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

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.ops.linear import check
from headrace.ops.linear_tiles import LinearProblem, LinearTile, choose


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features]
    residual_ptr,  # [num_tokens, out_features]
    out_ptr,  # [num_tokens, out_features]; may be residual
    num_tokens,
    out_features,
    in_features,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides in_features
    BLOCK_M: tl.constexpr,  # tokens
    BLOCK_N: tl.constexpr,  # height of the tile
    ROWS: tl.constexpr,  # rows of the weight in it
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # blocks of tokens that share weights while they are in L2
):
    """out[m, n] = sum_k w[n, k] x[m, k] + bias[n] + residual[m, n]: BLOCK_M of m, ROWS of n."""
    blocks_m = tl.cdiv(num_tokens, BLOCK_M)
    blocks_n = tl.cdiv(out_features, ROWS)
    pid = tl.program_id(0)
    group = pid // (blocks_n * GROUP_M)
    group_blocks = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    in_group = pid - group * blocks_n * GROUP_M
    pid_m = group * GROUP_M + in_group % group_blocks
    pid_n = in_group // group_blocks

    n = pid_n * ROWS + tl.arange(0, BLOCK_N)
    n_mask = n < tl.minimum(pid_n * ROWS + ROWS, out_features)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < num_tokens
    k = tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + n.to(tl.int64)[:, None] * in_features + k[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * in_features + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs, mask=n_mask[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=m_mask[None, :], other=0.0)
        else:
            in_k = k < in_features - start
            w = tl.load(w_ptrs, mask=n_mask[:, None] & in_k[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=m_mask[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * out_features + n[:, None]
    mask = n_mask[:, None] & m_mask[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    if len(x) == 0:
        return out
    tile = tile or choose(_problem(x, weight))
    blocks = triton.cdiv(len(x), tile.block_m) * triton.cdiv(len(weight), tile.rows)
    linear_kernel[(blocks,)](
        x,
        weight,
        weight if bias is None else bias,
        out if residual is None else residual,
        out,
        *x.shape[:1],
        *weight.shape,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN_K=weight.shape[1] % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        ROWS=tile.rows,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _problem(x: Tensor, weight: Tensor) -> LinearProblem:
    if not x.is_cuda:
        return LinearProblem(len(x), len(weight))
    gpu = torch.cuda.get_device_properties(x.device)
    return LinearProblem(
        len(x), len(weight), gpu.multi_processor_count, gpu.shared_memory_per_block_optin
    )


def _check_memory(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; pass a contiguous tensor")
    x = tensors["x"]
    if x is not None and x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f"x is {x.dtype}; pass bfloat16")
