from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from headrace.bench import kernels
from headrace.bench.case import Case, time_us
from headrace.bench.floors import GPUS
from headrace.bench.kernels import (
    SIZES,
    Failures,
    KernelRow,
    case_modules,
    modules_of,
    op_table,
    peer_of,
    report,
    run_kernels,
    write_rows,
)
from headrace.config import ConfigError

H100 = GPUS[0]


class Cases:
    """Two ops at given sizes."""

    OPS = ("add", "multiply")

    def cases(self, sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
        for op in self.OPS:
            for m in sizes:
                yield Case(op, {"width": 64}, m, lambda i: i, lambda: None, 3e6, 790e6)


def row(m: int, us: float, **labels: int) -> KernelRow:
    return KernelRow(labels, m, us, us / 2, "other", 3 * us, 1.0, 2.0)


def test_modules_of_the_wanted_ops() -> None:
    cases = Cases()
    assert modules_of([cases], ["multiply"]) == modules_of([cases], []) == [cases]


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no op divide; there are add, multiply"):
        modules_of([Cases()], ["divide"])


def test_every_module_names_the_ops_of_its_cases() -> None:
    pytest.importorskip("triton")
    modules = case_modules()
    ops = [op for module in modules for op in module.OPS]
    assert {"moe_layer", "router"} <= set(ops)
    assert len(ops) == len(set(ops))


def test_a_failure_is_told_and_counted() -> None:
    console = Console(record=True, width=100)
    failures = Failures(console)
    assert failures.attempt("seven", lambda: 7) == 7
    assert failures.attempt("a list", lambda: [][0]) is None
    assert failures.count == 1
    assert "a list: IndexError: list index out of range" in console.export_text()
    assert failures.attempt("a compiler", lambda: Path("x" * 10_000).stat()) is None
    assert console.export_text().count("x") < 1000


def test_the_floor_is_the_longer_of_bytes_and_arithmetic() -> None:
    case = next(Cases().cases([1], torch.device("cpu")))
    assert case.work.floor_s(H100) == pytest.approx(1e-6)
    assert replace(case, num_flops=7.9e9).work.floor_s(H100) == pytest.approx(1e-5)


def test_peers_are_found_by_gpu_op_labels_and_size() -> None:
    case = Case("moe_layer", {"experts": 128}, 512, lambda i: i, lambda: None, 1.0, 1.0)
    assert peer_of(case, H100) == ("vllm-0.24", 968)
    assert peer_of(replace(case, num_tokens=513), H100) == (None, None)
    assert peer_of(replace(case, labels={"experts": 64}), H100) == (None, None)
    assert peer_of(case, GPUS[1]) == peer_of(case, None) == (None, None)


def test_every_size_of_the_layer_has_a_peer() -> None:
    for experts in (32, 128):
        for m in SIZES:
            case = Case("moe_layer", {"experts": experts}, m, lambda i: i, lambda: None, 1.0, 1.0)
            assert peer_of(case, H100)[1]


def test_the_csv_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "new" / "op.csv", [row(1, 4.0, experts=32), row(2, 5.0, experts=32)])
    with (tmp_path / "new" / "op.csv").open() as file:
        lines = list(csv.DictReader(file))
    wanted = ["experts", "m", "us", "floor_us", "share", "peer", "peer_us"]
    assert list(lines[0])[: len(wanted)] == wanted
    assert [float(line["us"]) for line in lines] == [4.0, 5.0]
    assert float(lines[1]["share"]) == 0.5


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(m, 4.0 * m, experts=e) for e in (32, 128) for m in (1, 2, 4)]
    unknown = KernelRow({}, 1, 7.0, None, None, None, 1.0, 2.0)
    console = Console(record=True, width=100)
    report(console, {"layer": rows, "other": [unknown]}, tmp_path)
    text = console.export_text()
    assert "experts=128" in text
    assert "0.33" in text  # us / peer
    assert (tmp_path / "layer.png").stat().st_size > 10_000
    assert not (tmp_path / "other.png").exists()  # one size is no curve
    assert op_table("other", [unknown]).row_count == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        run_kernels(Console(), [], SIZES, None)


@pytest.mark.gpu
def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1 << 20, device="cuda")
    y = torch.empty_like(x)

    def wrong() -> None:
        raise AssertionError("off by one")

    def run(i: int) -> object:
        return torch.add(x, i, out=y)

    good = Case("add", {}, 1, run, lambda: None, 8.0 * len(x), len(x))

    class Both(Cases):
        def cases(self, sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
            yield replace(good, op="multiply", check=wrong)
            yield good
            raise MemoryError("no more")

    monkeypatch.setattr(kernels, "case_modules", lambda: [Both()])
    console = Console(record=True, width=200)
    assert run_kernels(console, [], [1], tmp_path) == 1
    assert "multiply m=1: AssertionError: off by one" in console.export_text(clear=False)
    assert "MemoryError: no more" in console.export_text(clear=False)
    assert (tmp_path / "add.csv").exists()
    assert not (tmp_path / "multiply.csv").exists()
    assert time_us(good) > 0.5  # less would be milliseconds; how long depends on who else runs


@pytest.mark.gpu
def test_every_op_runs_at_one_size() -> None:
    for module in case_modules():
        for case in module.cases([3], torch.device("cuda")):
            case.check()
            assert case.op in module.OPS
