"""Rotary position embedding in half-split pairing, with YaRN's frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.ops import dispatch
from headrace.ops.kv_write import write_kv


def rope_inv_freq(head_dim: int, theta: float) -> Tensor:
    """f_i = theta^(-2i / head_dim). Returns [head_dim / 2] float64."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def yarn_inv_freq(
    head_dim: int,
    theta: float,
    factor: float,
    original_context: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    """f_i (1 - r_i) + (f_i / factor) r_i with r_i = clamp((i - low) / (high - low), 0, 1).

    low and high are the dimensions that turn beta_fast and beta_slow times within
    original_context: d(turns) = head_dim ln(original_context / (2 pi turns)) / (2 ln theta),
    rounded outwards only if truncate. Returns [head_dim / 2] float64.
    """

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(original_context / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # YaRN's guard against an empty ramp
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    freq = rope_inv_freq(head_dim, theta)
    return freq * (1 - ramp) + freq / factor * ramp


def yarn_attention_factor(factor: float) -> float:
    """0.1 ln(factor) + 1, by which YaRN multiplies both cos and sin."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_cos_sin(
    positions: Tensor,  # [num_tokens] int64
    inv_freq: Tensor,  # [head_dim / 2] float32
    attention_factor: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inv_freq, times attention_factor.

    Returns two [num_tokens, 1, head_dim / 2] float32, for any number of heads.
    """
    if dispatch.takes_kernel(positions):
        # Triton may be missing where there is no GPU
        from headrace.ops import rope_kernel

        if out is None:
            shape = (len(positions), 1, len(inv_freq))
            out = inv_freq.new_empty(shape), inv_freq.new_empty(shape)
        return rope_kernel.rope_cos_sin(positions, inv_freq, attention_factor, out)
    angles = (positions.unsqueeze(-1) * inv_freq).unsqueeze(1)
    cos, sin = (torch.empty_like(angles), torch.empty_like(angles)) if out is None else out
    torch.cos(angles, out=cos).mul_(attention_factor)
    torch.sin(angles, out=sin).mul_(attention_factor)
    return cos, sin


def rope_and_cache(
    qkv: Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: all q, then k, then v
    cos: Tensor,  # [num_tokens, 1, head_dim / 2] float32
    sin: Tensor,  # [num_tokens, 1, head_dim / 2] float32
    kv_cache: Tensor,  # [2 (k, v), num_pages, block_size, num_kv_heads, head_dim], written in place
    slots: Tensor,  # [num_tokens] int64: page * block_size + offset; -1: k and v go nowhere
    num_heads: int,
    num_kv_heads: int,
    out: Tensor | None = None,  # [num_tokens, num_heads, head_dim]
) -> Tensor:
    """Rotate q and k as apply_rope; k and v go to their slots of the cache. Returns the rotated q.

    Tokens with the same slot must have the same k and v. Raises ValueError for what the GPU's
    kernel does not take.
    """
    if dispatch.takes_kernel(qkv):
        from headrace.ops import rope_kernel

        if out is None:
            out = qkv.new_empty(len(qkv), num_heads, kv_cache.shape[-1])
        return rope_kernel.rope_and_cache(
            qkv, cos, sin, kv_cache, slots, num_heads, num_kv_heads, out
        )
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
    # q and k are rotated together: their heads lie side by side
    qk = apply_rope(heads[:, : num_heads + num_kv_heads], cos, sin)
    q, k = qk.split((num_heads, num_kv_heads), dim=1)
    write_kv(kv_cache, k, heads[:, num_heads + num_kv_heads :], slots)
    return q if out is None else out.copy_(q)


def apply_rope(
    x: Tensor,  # [num_tokens, heads, head_dim]
    cos: Tensor,  # [num_tokens, 1, head_dim / 2] float32
    sin: Tensor,  # [num_tokens, 1, head_dim / 2] float32
) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of each head, in float32.

    Returns [num_tokens, heads, head_dim] in x's dtype.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
