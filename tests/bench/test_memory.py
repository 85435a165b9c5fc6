from __future__ import annotations

import os
import subprocess
import sys
import time

from headrace.bench.memory import descendants, peak_resident, watched_memory

MIB = 2**20


def test_the_peak_of_a_child_is_kept_after_it_fell() -> None:
    code = "x = bytearray(200 * 2**20); x = None; print('small', flush=True); input()"
    with watched_memory() as peak:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in descendants(os.getpid())
        assert 200 * MIB < peak_resident(child.pid) < 300 * MIB
        deadline = time.monotonic() + 60
        while (peak.host or 0) < 200 * MIB and time.monotonic() < deadline:
            time.sleep(0.05)
        child.communicate("\n")
    assert peak.host is not None
    assert peak.host > 200 * MIB
    assert peak_resident(child.pid) == 0


def test_grandchildren_are_found() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True); input(); child.communicate(b'\\n')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert {child.pid, grandchild} <= set(descendants(os.getpid()))
    child.communicate("\n")
    assert grandchild not in descendants(os.getpid())
