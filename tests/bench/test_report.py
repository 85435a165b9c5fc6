"""The HTML report of a sweep: right figures, floors and peers, nothing fetched from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headrace.bench.floors import GPUS, Gpu
from headrace.bench.report import Report, SweepRow, write_report
from headrace.bench.synth import SIZES
from headrace.models.config import parse_config

CONFIG = parse_config(SIZES["20b"])
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
ROWS = [
    SweepRow(1, 512, 128, 0, 580.0, 10.0, 9.0, 1.61),
    SweepRow(16, 512, 128, 0, 3200.0, 30.0, 29.0, 3.295),
    SweepRow(16, 215, 199, 0, 3888.0, 25.0, 24.0, 3.47),
    SweepRow(16, 512, 128, 2, 2900.0, 40.0, 39.0, 5.55),
]


def report(gpu: Gpu | None, rank: int = 64) -> Report:
    return Report("gpt-oss <20b>", "NVIDIA H100", gpu, CONFIG, rank, ROWS)


def cells(html: str) -> list[list[str]]:
    return [re.findall(r"<td>(.*?)</td>", line) for line in html.splitlines() if "<td>" in line]


def test_rows_have_their_floor_and_their_peer(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", report(H100))
    text = (tmp_path / "r.html").read_text()
    one, decode, served, adapters = cells(text)
    assert one[:4] == ["1", "512", "128", "580"]
    floor = float(one[8])
    assert floor == pytest.approx(1.24, abs=0.03)  # peers.md's floor of one user
    assert float(one[9]) == pytest.approx(1.61 / floor, abs=0.02)
    assert one[10:] == ["3.22", "0.50"]
    assert decode[4:] == ["", "30.0", "29.0", "3.29", decode[8], decode[9], "6.59", "0.50"]
    assert served[4] == "1,944"
    assert served[10:] == ["6.94", "0.50"]
    assert adapters[8:] == ["", "", "11.10", "0.50"]  # the floor with adapters isn't known
    assert "gpt-oss &lt;20b&gt;" in text


def test_it_is_one_file(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", report(H100))
    text = (tmp_path / "r.html").read_text()
    assert text.count("<svg") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    outside = re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", text)
    assert outside == []
    assert "@import" not in text


def test_peers_of_another_gpu_rank_or_model_are_left_out(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", report(None))
    assert all(row[8:] == ["", "", "", ""] and row[4] == "" for row in cells(
        (tmp_path / "r.html").read_text()
    ))  # fmt: skip
    write_report(tmp_path / "r.html", report(H100, rank=8))
    assert cells((tmp_path / "r.html").read_text())[3][10:] == ["", ""]
