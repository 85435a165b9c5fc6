"""How many pages each KV group gets, and how long a request may be."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from headrace.config import ConfigError, EngineConfig
from headrace.models.batch import KVLayout

CPU_SHARE, CPU_MOST = 0.25, 1 << 30  # of the memory that is available now
CUDA_SHARE, CUDA_RESERVE = 0.9, 1 << 30  # the reserve is for a step's intermediate tensors


def cache_memory(config: EngineConfig, device: torch.device) -> int:
    """Bytes for the cache: the flag, or a share of the free memory."""
    if config.kv_cache_memory:
        return config.kv_cache_memory
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, int(free * CUDA_SHARE) - CUDA_RESERVE)
    return min(CPU_MOST, int(available_memory() * CPU_SHARE))


def available_memory() -> int:
    """Bytes that a new process could use without swapping; all of them where unknown."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def page_bytes(layout: KVLayout, block_size: int, dtype: torch.dtype) -> list[int]:
    """Bytes of one page of each group: k and v of its layers."""
    layer = 2 * block_size * layout.num_kv_heads * layout.head_dim * dtype.itemsize
    return [layer * layout.group_of_layer.count(g) for g in range(len(layout.windows))]


def plan_pages(
    layout: KVLayout, config: EngineConfig, memory: int, dtype: torch.dtype
) -> list[int]:
    """Pages of each group.

    Window groups get what max_num_seqs running requests can hold at most, twice, so that as
    much again can be found by the prefix cache, but never more than half of the memory. The
    full groups share the rest.

    Raises:
        ConfigError: the memory can't hold the window of one request and a page of each full group.
    """
    sizes = page_bytes(layout, config.block_size, dtype)
    full = [g for g, window in enumerate(layout.windows) if not window]
    # a window not aligned to pages touches one more, and the next token may need another
    least = [-(-window // config.block_size) + 2 if window else 1 for window in layout.windows]
    needed = sum(n * size for n, size in zip(least, sizes, strict=True))
    if needed > memory:
        raise ConfigError(
            f"--kv-cache-memory is {memory} bytes; the smallest cache of this model takes {needed}"
        )
    if not full:
        return [memory // sum(sizes)] * len(sizes)
    chunk = -(-config.max_num_batched_tokens // config.block_size)
    pages = [0] * len(sizes)
    share = (memory // 2) // (len(sizes) - len(full) or 1)
    for g, window in enumerate(layout.windows):
        if window:
            most = 2 * (config.max_num_seqs * least[g] + chunk)
            pages[g] = max(least[g], min(most, share // sizes[g]))
    rest = memory - sum(n * size for n, size in zip(pages, sizes, strict=True))
    for g in full:
        pages[g] = rest // sum(sizes[g] for g in full)
    return pages


def resolve_max_model_len(
    layout: KVLayout, config: EngineConfig, pages: list[int], dtype: torch.dtype, positions: int
) -> int:
    """The flag if model and cache allow it, or else the longest that both do.

    Raises:
        ConfigError: --max-model-len is more than the model's positions or than the cache holds.
    """
    full_pages = [n for n, window in zip(pages, layout.windows, strict=True) if not window]
    capacity = min(full_pages, default=positions) * (config.block_size if full_pages else 1)
    wanted = config.max_model_len
    if wanted is None:
        return min(positions, capacity)
    if wanted > positions:
        raise ConfigError(
            f"--max-model-len is {wanted}; this model has {positions} positions: use at most that"
        )
    if wanted > capacity:
        sizes = page_bytes(layout, config.block_size, dtype)
        missing = -(-(wanted - capacity) // config.block_size)
        more = missing * sum(s for s, w in zip(sizes, layout.windows, strict=True) if not w)
        raise ConfigError(
            f"--max-model-len is {wanted}, but the KV cache holds {capacity} tokens: lower it to "
            f"{capacity} or give --kv-cache-memory {more} bytes more"
        )
    return wanted
