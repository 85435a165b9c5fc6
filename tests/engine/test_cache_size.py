"""Memory is split over the groups, never exceeded, and what does not fit is refused."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import ConfigError, EngineConfig
from headrace.engine.cache_size import (
    CPU_MOST,
    available_memory,
    cache_memory,
    page_bytes,
    plan_cache,
)
from headrace.models import KVLayout

BF16 = torch.bfloat16
# gpt-oss-20b: 24 layers, every other one with a window of 128
LARGE = KVLayout(24, 64, 8, 64, (128, 0), (0, 1) * 12)


def test_page_bytes() -> None:
    assert page_bytes(LARGE, 16, BF16) == [12 * 2 * 16 * 8 * 64 * 2] * 2
    assert page_bytes(KVLayout(3, 1, 1, 8, (0, 4), (0, 1, 1)), 2, torch.float32) == [128, 256]


def test_window_groups_get_what_they_can_use_and_full_groups_the_rest() -> None:
    memory = 40 << 30
    (window, full), longest = plan_cache(LARGE, EngineConfig(), memory, BF16, 131072)
    assert window == 2 * (64 * (128 // 16 + 2) + 2048 // 16)
    assert full == memory // page_bytes(LARGE, 16, BF16)[0] - window
    assert longest == 131072


@given(
    windows=st.lists(st.sampled_from([0, 5, 64]), min_size=1, max_size=4),
    memory=st.integers(1, 1 << 20),
    block_size=st.integers(1, 32),
    max_num_seqs=st.integers(1, 100),
    max_model_len=st.none() | st.integers(1, 5000),
)
def test_the_plan_fits_the_memory(
    windows: list[int], memory: int, block_size: int, max_num_seqs: int, max_model_len: int | None
) -> None:
    layout = KVLayout(len(windows), 1, 1, 4, tuple(windows), tuple(range(len(windows))))
    config = EngineConfig(
        block_size=block_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )
    sizes = page_bytes(layout, block_size, BF16)
    long = -(-(max_model_len or 1) // block_size)
    least = [-(-w // block_size) + 2 if w else long for w in windows]
    needed = sum(n * size for n, size in zip(least, sizes, strict=True))
    if needed > memory:
        with pytest.raises(ConfigError, match=rf"{memory} bytes.*--kv-cache-memory {needed}"):
            plan_cache(layout, config, memory, BF16, 5000)
        assert plan_cache(layout, config, needed, BF16, 5000)[0] == least
        return
    pages, longest = plan_cache(layout, config, memory, BF16, 5000)
    used = sum(n * size for n, size in zip(pages, sizes, strict=True))
    assert memory - sum(sizes) < used <= memory
    assert all(n >= m for n, m in zip(pages, least, strict=True))
    capacity = min([n * block_size for n, w in zip(pages, windows, strict=True) if not w] or [5000])
    assert longest == (max_model_len or min(5000, capacity))
    assert longest <= capacity


def test_both_ways_out_of_a_model_length_that_does_not_fit_work() -> None:
    def plan(memory: int, max_model_len: int) -> int:
        config = EngineConfig(max_model_len=max_model_len)
        return plan_cache(LARGE, config, memory, BF16, 131072)[1]

    with pytest.raises(ConfigError, match="--max-model-len is 4000") as caught:
        plan(64 << 20, 4000)
    numbers = re.search(r"--kv-cache-memory (\d+) or lower it to (\d+)", str(caught.value))
    assert numbers
    memory, length = map(int, numbers.groups())
    assert plan(memory, 4000) == 4000
    assert plan(64 << 20, length) == length
    for closer in ((memory - 1, 4000), (64 << 20, length + 1)):
        with pytest.raises(ConfigError):
            plan(*closer)


def test_no_more_than_the_models_positions() -> None:
    with pytest.raises(ConfigError, match="--max-model-len is 513; this model has 512 positions"):
        plan_cache(LARGE, EngineConfig(max_model_len=513), 1 << 30, BF16, 512)


def test_memory_of_the_flag_or_a_share_of_the_free() -> None:
    cpu = torch.device("cpu")
    assert cache_memory(EngineConfig(kv_cache_memory=12345), cpu) == 12345
    assert 0 < cache_memory(EngineConfig(), cpu) <= min(CPU_MOST, available_memory())
