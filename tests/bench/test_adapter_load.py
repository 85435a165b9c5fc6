from __future__ import annotations

import csv
from pathlib import Path

import pytest

from headrace.bench.adapter_load import measure, run_adapter_load
from headrace.bench.synth_adapter import write_adapter
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.files import BUNDLED_MODEL
from headrace.models.config import read_config

CONFIG = EngineConfig(model=BUNDLED_MODEL, device="cpu", kv_cache_memory=64 << 20)


def test_each_load_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.bench.adapter_load.QUIET_STEPS", 8)
    monkeypatch.setattr("headrace.bench.adapter_load.NUM_RUNS", 3)
    run_adapter_load(CONFIG, rank=4, batch=2, csv=tmp_path / "load.csv")
    with (tmp_path / "load.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert 0 < float(row["quiet_gap_ms"]) <= float(row["quiet_worst_ms"]) < 1e4
        # the median is of all gaps of the load, those while the machine was slow, too
        worst_ms = max(float(row["worst_gap_ms"]), float(row["slow_worst_ms"]))
        assert worst_ms >= float(row["loading_gap_ms"])
        assert 1000 * float(row["load_s"]) + 1 >= float(row["loading_gap_ms"])  # in whole ms
    assert "an adapter of rank 4" in capsys.readouterr().out


def test_a_refused_adapter_is_no_measurement(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", read_config(BUNDLED_MODEL), 8, seed=0)
    engine = Engine(
        EngineConfig(
            **{"model": BUNDLED_MODEL, "device": "cpu", "kv_cache_memory": 64 << 20},
            **{"enable_lora": True, "max_lora_rank": 4},
        )
    )
    with pytest.raises(ConfigError, match="above --max-lora-rank 4"):
        measure(engine, tmp_path / "a", 8, 1)
