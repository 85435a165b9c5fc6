from __future__ import annotations

import pytest

from headrace.bench.floors import (
    GPUS,
    Step,
    Work,
    experts_hit,
    find_gpu,
    lora_work,
    step_work,
    total,
)
from headrace.bench.synth import SIZES
from headrace.models.config import parse_config

H100 = GPUS[0]
GPT_OSS_20B = parse_config(SIZES["20b"])


@pytest.mark.parametrize(
    ("batch", "floor_ms"),
    [(1, 1.24), (2, 1.62), (4, 2.23), (8, 3.08), (16, 3.88), (32, 4.32), (64, 4.53), (128, 4.87)],
)
def test_decode_floors_of_the_20b_model(batch: int, floor_ms: float) -> None:
    """The floors that peers were held against; their routing was counted, ours is expected."""
    work = total(step_work(GPT_OSS_20B, Step(batch, 1, 512)))
    assert 1000 * work.floor_s(H100) == pytest.approx(floor_ms, rel=0.02)


@pytest.mark.parametrize(
    ("batch", "floor_ms"),
    [(1, 1.32), (2, 1.8), (4, 2.5), (8, 3.5), (16, 4.5), (32, 5.2), (64, 5.5), (128, 5.9)],
)
def test_decode_floors_with_two_adapters_of_rank_64(batch: int, floor_ms: float) -> None:
    step = Step(batch, 1, 512)
    work = total(step_work(GPT_OSS_20B, step)) + lora_work(GPT_OSS_20B, step, 2, 64)
    assert 1000 * work.floor_s(H100) == pytest.approx(floor_ms, rel=0.03)


def test_adapters_add_nothing_where_there_are_none() -> None:
    assert lora_work(GPT_OSS_20B, Step(4, 1, 512), 0, 64) == Work(0, 0)


def test_bytes_of_one_adapter_by_hand() -> None:
    work = lora_work(GPT_OSS_20B, Step(1, 1, 512), 2, 8)
    attention = 2 * (2880 + 4096) + 2 * (2880 + 512)
    expert = (2880 + 5760) + (2880 + 2880)
    assert work.bytes == 24 * 8 * 2 * (attention + 4 * expert)
    assert work.flops == work.bytes


def test_bytes_of_one_decode_step_by_hand() -> None:
    work = step_work(GPT_OSS_20B, Step(1, 1, 511))
    assert work["qkv"].bytes == 24 * 5120 * 2880 * 2
    assert work["output"].bytes == 24 * 4096 * 2880 * 2
    assert work["lm_head"] == Work(201088 * 2880 * 2, 2 * 201088 * 2880)
    assert work["gate_up"].bytes == 24 * 4 * 5760 * (1440 + 90)
    assert work["down"].flops == 24 * 4 * 2 * 2880 * 2880
    # 12 layers read 512 keys and values of 8 heads, 12 the last 128
    assert work["attention"].bytes == 12 * (512 + 128) * 2 * 8 * 64 * 2


def test_attention_of_a_prefill_by_hand() -> None:
    """Query i sees i + 1 keys; in a window of 128 at most that many."""
    work = step_work(GPT_OSS_20B, Step(2, 200, 0))["attention"]
    full, windowed = 200 * 201 / 2, 128 * 129 / 2 + 72 * 128
    assert work.flops == 2 * 12 * (full + windowed) * 4 * 64 * 64
    assert work.bytes == 2 * 12 * (200 + 200) * 2 * 8 * 64 * 2


def test_a_chunk_adds_what_the_whole_has_more() -> None:
    whole = step_work(GPT_OSS_20B, Step(1, 300, 0))["attention"].flops
    parts = [Step(1, 100, 0), Step(1, 150, 100), Step(1, 50, 250)]
    assert sum(step_work(GPT_OSS_20B, p)["attention"].flops for p in parts) == whole


def test_large_prefills_are_bound_by_arithmetic() -> None:
    work = total(step_work(GPT_OSS_20B, Step(64, 512, 0)))
    assert work.floor_s(H100) == work.flops / H100.flops_per_s > work.bytes / H100.bytes_per_s


def test_experts_hit() -> None:
    assert experts_hit(32, 4, 1) == 4
    assert experts_hit(32, 4, 2) == 4 + 4 * 28 / 32
    assert experts_hit(32, 4, 4096) == 32


def test_gpus_by_the_names_that_torch_gives() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3") == H100
    assert find_gpu("NVIDIA H200") == GPUS[1]
    assert find_gpu("NVIDIA A100-SXM4-80GB") is None
