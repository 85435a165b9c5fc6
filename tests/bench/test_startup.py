from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from headrace.bench.results import write_csv
from headrace.bench.startup import (
    StartupRow,
    drop_page_cache,
    kernel_cache,
    measure_start,
    read_phases,
    startup_table,
)
from headrace.files import BUNDLED_MODEL

FLAGS = ("--device", "cpu", "--kv-cache-memory", "20000000")

METRICS = """\
# HELP headrace:startup_seconds Of each part of the start
# TYPE headrace:startup_seconds gauge
headrace:startup_seconds{engine="0",model_name="tiny",phase="imports"} 2.5
headrace:startup_seconds{engine="0",model_name="tiny",phase="weights"} 1.25e+01
vllm:num_requests_running{engine="0",model_name="tiny"} 0.0
"""


def test_a_server_is_started_asked_and_stopped(tmp_path: Path) -> None:
    rows = measure_start(BUNDLED_MODEL, FLAGS, "warm")
    listening, answered = rows[-2:]
    assert (listening.phase, answered.phase) == ("until it listens", "until the first answer")
    assert 0 < listening.seconds <= answered.seconds
    assert {"imports", "weights", "cache"} <= {row.phase for row in rows[:-2]}
    assert sum(row.seconds for row in rows[:-2]) <= answered.seconds
    assert answered.host_gib is not None
    assert 0.2 < answered.host_gib < 8
    write_csv(tmp_path / "startup.csv", rows)
    header, *lines = (tmp_path / "startup.csv").read_text().splitlines()
    assert header == "cache,phase,seconds,host_gib,gpu_gib"
    assert lines[-1].startswith("warm,until the first answer,")


def test_phases_from_the_metrics() -> None:
    assert read_phases(METRICS) == {"imports": 2.5, "weights": 12.5}


def test_the_cache_of_kernels_is_set_for_children_only_while_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with kernel_cache(tmp_path):
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    with kernel_cache(tmp_path):
        pass
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_dropping_the_page_cache_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 10000)
    drop_page_cache(tmp_path)
    assert file.read_bytes() == b"x" * 10000


def test_the_table_has_cold_beside_warm() -> None:
    rows = [
        StartupRow("cold", "kernels", 6.0),
        StartupRow("cold", "until the first answer", 19.5, 4.5, None),
        StartupRow("warm", "kernels", 0.5),
        StartupRow("warm", "until the first answer", 9.25, 4.25, 70.0),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(startup_table(rows, "model"))
    cells = [
        [c.strip() for c in line.split("│")[1:-1]] for line in console.export_text().split("\n")
    ]
    assert ["kernels", "6.00", "0.50"] in cells
    assert ["until the first answer", "19.50", "9.25"] in cells
    assert ["peak host GiB", "4.50", "4.25"] in cells
    assert ["peak GPU GiB", "", "70.00"] in cells
