"""How many pages each KV group gets, and how long a request may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
        torch.cuda.empty_cache()  # what torch keeps for later is free too
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


def plan_cache(
    layout: KVLayout, config: EngineConfig, memory: int, dtype: torch.dtype, positions: int
) -> tuple[list[int], int]:
    """Pages of each group, and the longest prompt plus output.

    Every group gets the least that one request needs. Up to half of what is left goes to window
    groups: what max_num_seqs running requests can hold, twice, so that as much again can be found
    by the prefix cache. The rest goes to the full groups.

    Raises:
        ConfigError: --max-model-len is more than the model's positions or than the memory holds.
    """
    if (config.max_model_len or 0) > positions:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}; this model has {positions} positions"
        )
    block_size, windows = config.block_size, layout.windows
    sizes = page_bytes(layout, block_size, dtype)
    full_bytes = sum(size for size, window in zip(sizes, windows, strict=True) if not window)
    long = -(-(config.max_model_len or 1) // block_size)
    # a window not aligned to pages touches one more, and the next token may need another
    pages = [-(-window // block_size) + 2 if window else long for window in windows]
    left = memory - sum(n * size for n, size in zip(pages, sizes, strict=True))
    if left < 0:
        raise ConfigError(_too_small(config, memory, -left, long, full_bytes))
    if not full_bytes:
        return [n + left // sum(sizes) for n in pages], config.max_model_len or positions
    windowed = [g for g, window in enumerate(windows) if window]
    chunk = -(-config.max_num_batched_tokens // block_size)
    for g in windowed:
        most = 2 * (config.max_num_seqs * pages[g] + chunk)
        pages[g] += min(most - pages[g], left // 2 // len(windowed) // sizes[g])
    rest = memory - sum(pages[g] * sizes[g] for g in windowed)
    pages = [n if window else rest // full_bytes for n, window in zip(pages, windows, strict=True)]
    return pages, config.max_model_len or min(positions, rest // full_bytes * block_size)


def _too_small(config: EngineConfig, memory: int, missing: int, long: int, full_bytes: int) -> str:
    """What to change when the least pages of all groups don't fit."""
    advice = f"give --kv-cache-memory {memory + missing}"
    if config.max_model_len is None:
        return f"--kv-cache-memory is {memory} bytes, too few for one request: {advice}"
    fitting = (long - -(-missing // full_bytes)) * config.block_size if full_bytes else 0
    if fitting > 0:
        advice += f" or lower it to {fitting}"
    return (
        f"--max-model-len is {config.max_model_len}, too long for {memory} bytes of cache: {advice}"
    )


@contextmanager
def memory_for(what: str, flag: str) -> Iterator[None]:
    """Raise ConfigError, naming the flag to lower, where the device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        free, _ = torch.cuda.mem_get_info()
        raise ConfigError(
            f"{what} does not fit into the {free / 1e9:.1f} GB that are free on the GPU; "
            f"lower {flag}"
        ) from None
