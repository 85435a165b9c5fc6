from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import msgspec
import pytest

from headrace.engine import phases as module
from headrace.engine.phases import Phases, StartReport


def test_phases_add_up_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10, 12, 20, 21, 30, 33])  # a machine that stalls would make any phase longer
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    phases = Phases()
    for name in ("weights", "cache", "weights"):
        with phases(name):
            pass
    assert list(phases.seconds) == ["imports", "weights", "cache"]
    assert phases.seconds["weights"] == 2 + 3
    assert phases.seconds["cache"] == 1


def test_a_phase_that_fails_is_counted() -> None:
    phases = Phases()
    with pytest.raises(KeyError), phases("weights"):
        raise KeyError
    assert "weights" in phases.seconds


def test_imports_run_from_the_start_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.3)\n"
        "from headrace.engine.phases import process_age\n"
        "print(process_age())"
    )
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(out.stdout) <= time.perf_counter() - start + 0.05


def test_a_process_that_has_settled_collects_what_it_makes_from_then_on() -> None:
    code = (
        "import gc; gc.disable()\n"
        "from headrace.engine.phases import settle\n"
        "settle()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "True"]


def test_a_report_travels() -> None:
    report = StartReport({"imports": 1.5, "weights": 2.0}, cache_bytes=3, cache_tokens=4)
    sent = msgspec.msgpack.encode(report)
    assert msgspec.msgpack.decode(sent, type=StartReport) == report
