from __future__ import annotations

from dataclasses import replace

from headrace.bench.peers import find_row, peer_rows
from headrace.bench.synth import SIZES
from headrace.models.config import parse_config

GPT_OSS_20B = parse_config(SIZES["20b"])


def test_a_row_of_the_same_model_on_the_same_gpu() -> None:
    rows = peer_rows("latency", GPT_OSS_20B, "H100")
    row = find_row(rows, adapters=0, batch=16, prompt=512)
    assert row is not None
    assert (row["tpot_ms"], row["prefill_ms"]) == (6.59, 107.8)
    assert find_row(rows, adapters=0, batch=3, prompt=512) is None


def test_no_row_for_another_model_or_gpu() -> None:
    assert peer_rows("latency", GPT_OSS_20B, "H200") == []
    assert peer_rows("serve", GPT_OSS_20B, None) == []
    assert peer_rows("serve", replace(GPT_OSS_20B, num_local_experts=128), "H100") == []
