# mypy: disable-error-code="no-untyped-def"
"""Rotary embedding on the GPU: the step's cosines in one launch, then one launch a layer.

The layer's launch splits the fused qkv, rotates q and k, and puts k and v into their pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops import dispatch

BLOCK_HEADS = 16  # of one token, in a program


@triton.jit
def cos_sin_kernel(
    positions_ptr,  # [num_tokens] int64
    inv_freq_ptr,  # [head_dim / 2] float32
    cos_ptr,  # [num_tokens, head_dim / 2] float32
    sin_ptr,
    num_values,
    half_dim,
    attention_factor,
    BLOCK: tl.constexpr,
):
    """cos and sin of position * inv_freq, times attention_factor."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_values
    position = tl.load(positions_ptr + i // half_dim, mask=mask, other=0).to(tl.float32)
    angle = position * tl.load(inv_freq_ptr + i % half_dim, mask=mask, other=0.0)
    tl.store(cos_ptr + i, tl.cos(angle) * attention_factor, mask=mask)
    tl.store(sin_ptr + i, tl.sin(angle) * attention_factor, mask=mask)


@triton.jit
def rope_and_cache_kernel(
    qkv_ptr,  # [num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, 2 * HALF_DIM]
    cos_ptr,  # [num_tokens, HALF_DIM] float32
    sin_ptr,
    cache_ptr,  # [2 (k, v), num_slots, NUM_KV_HEADS, 2 * HALF_DIM]
    slots_ptr,  # [num_tokens] int64
    q_ptr,  # [num_tokens, NUM_HEADS, 2 * HALF_DIM]
    value_offset,  # elements from k to v
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    EARLY: tl.constexpr,  # sm_90: launched before the kernel before it has ended
):
    """BLOCK_HEADS heads of one token."""
    if EARLY:
        gdc_launch_dependents()  # attention finds its keys' pages meanwhile
        gdc_wait()
    HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_DIM)[None, :]
    in_half = column < HALF_DIM
    mask = (head < HEADS) & in_half
    slot = tl.load(slots_ptr + token)
    cos = tl.load(cos_ptr + token * HALF_DIM + column, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + token * HALF_DIM + column, mask=in_half, other=0.0)
    x_ptrs = qkv_ptr + (token * HEADS + head) * (2 * HALF_DIM) + column
    a = tl.load(x_ptrs, mask=mask, other=0.0)
    b = tl.load(x_ptrs + HALF_DIM, mask=mask, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    a = tl.where(is_value, a, (wide_a * cos - wide_b * sin).to(a.dtype))
    b = tl.where(is_value, b, (wide_b * cos + wide_a * sin).to(b.dtype))
    q_ptrs = q_ptr + (token * NUM_HEADS + head) * (2 * HALF_DIM) + column
    q_mask = (head < NUM_HEADS) & in_half
    tl.store(q_ptrs, a, mask=q_mask)
    tl.store(q_ptrs + HALF_DIM, b, mask=q_mask)
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    cache_place = (slot * NUM_KV_HEADS + kv_head) * (2 * HALF_DIM) + column
    cache_ptrs = cache_ptr + tl.where(is_value, value_offset, 0) + cache_place
    cache_mask = mask & (head >= NUM_HEADS) & (slot >= 0)
    tl.store(cache_ptrs, a, mask=cache_mask)
    tl.store(cache_ptrs + HALF_DIM, b, mask=cache_mask)


def rope_cos_sin(
    positions: Tensor,  # [num_tokens] int64
    inv_freq: Tensor,  # [head_dim / 2] float32
    attention_factor: float,
    out: tuple[Tensor, Tensor],  # each [num_tokens, 1, head_dim / 2] float32
) -> tuple[Tensor, Tensor]:
    """See `headrace.ops.rope.rope_cos_sin`. Raises ValueError where the shapes do not fit."""
    shape = (len(positions), 1, len(inv_freq))
    for name, tensor in zip(("cos", "sin"), out, strict=True):
        _check_rows(name, tensor, shape, torch.float32)
    _check_rows("inv_freq", inv_freq, (len(inv_freq),), torch.float32)
    cos, sin = out
    if cos.numel():
        cos_sin_kernel[(triton.cdiv(cos.numel(), 256),)](
            positions, inv_freq, cos, sin, cos.numel(), len(inv_freq), attention_factor, BLOCK=256
        )  # fmt: skip
    return out


def rope_and_cache(
    qkv: Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    cos: Tensor,  # [num_tokens, 1, head_dim / 2] float32
    sin: Tensor,  # [num_tokens, 1, head_dim / 2] float32
    kv_cache: Tensor,  # [2 (k, v), num_pages, block_size, num_kv_heads, head_dim], written in place
    slots: Tensor,  # [num_tokens] int64
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,  # [num_tokens, num_heads, head_dim]
) -> Tensor:
    """See `headrace.ops.rope.rope_and_cache`. Raises ValueError where the shapes do not fit."""
    num_tokens, (kv_heads, head_dim) = len(qkv), kv_cache.shape[3:]
    if kv_heads != num_kv_heads or len(kv_cache) != 2 or not kv_cache.is_contiguous():
        raise ValueError(
            f"kv_cache has shape {tuple(kv_cache.shape)}; {num_kv_heads} KV heads need contiguous "
            f"[2, num_pages, block_size, {num_kv_heads}, head_dim]"
        )
    dtype, heads = kv_cache.dtype, num_heads + 2 * num_kv_heads
    _check_rows("qkv", qkv, (num_tokens, heads * head_dim), dtype)
    _check_rows("out", out, (num_tokens, num_heads, head_dim), dtype)
    _check_rows("cos", cos, (num_tokens, 1, head_dim // 2), torch.float32)
    _check_rows("sin", sin, (num_tokens, 1, head_dim // 2), torch.float32)
    _check_rows("slots", slots, (num_tokens,), torch.int64)
    early = dispatch.is_hopper(qkv)
    if num_tokens:
        rope_and_cache_kernel[(num_tokens, triton.cdiv(heads, BLOCK_HEADS))](
            qkv, cos, sin, kv_cache, slots, out, kv_cache.stride(0),
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF_DIM=head_dim // 2,
            BLOCK_HEADS=BLOCK_HEADS, BLOCK_DIM=triton.next_power_of_2(head_dim // 2),
            EARLY=early, launch_pdl=early,
        )  # fmt: skip
    return out


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}; this call "
            f"needs contiguous {dtype} {shape}"
        )
