"""Write new keys and values into their pages."""

from __future__ import annotations

from torch import Tensor


def write_kv(
    kv_cache: Tensor,  # [2 (k, v), num_pages, block_size, num_kv_heads, head_dim], written in place
    k: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    slots: Tensor,  # [num_tokens] int64: page * block_size + offset; -1: nowhere
) -> None:
    """cache[slots[t]] = k[t], v[t] for every t with a slot."""
    assert k.shape == v.shape == (len(slots), *kv_cache.shape[3:]), f"{k.shape=} {kv_cache.shape=}"
    keys, values = kv_cache.flatten(1, 2)
    given = slots >= 0
    keys.index_copy_(0, slots[given], k[given].to(keys.dtype))
    values.index_copy_(0, slots[given], v[given].to(values.dtype))
