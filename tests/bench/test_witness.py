"""When the machine was slow, and which times meet."""

from __future__ import annotations

import contextlib
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from headrace.bench import witness
from headrace.bench.adapter_load import Gaps
from headrace.bench.witness import Witness, overlap


@pytest.mark.parametrize(
    ("interval", "meets"),
    [((0, 1), False), ((0, 2.1), True), ((2.2, 2.3), True), ((3, 4), False), ((1, 9), True)],
)
def test_overlap(interval: tuple[float, float], meets: bool) -> None:
    assert overlap(interval, [(2, 3), (5, 6)]) == meets


def test_gaps_of_a_slow_machine_stand_apart() -> None:
    gaps = Gaps.of([(0, 1), (1, 3), (3, 4), (4, 6)], [(1.5, 1.6)])
    assert (gaps.usual, gaps.slow) == ([1000, 2000], [2000, 1000])
    gaps = Gaps.of([(0, 1), (1, 3)], [(0, 3)])
    assert (gaps.usual, gaps.slow) == ([1000, 2000], [])


def end_quietly(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        witness._watch(pipe)


def test_slow_rounds_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Pipe()
    thread = threading.Thread(target=end_quietly, args=(theirs,), daemon=True)
    thread.start()
    assert ours.poll(20)
    ours.recv()
    monkeypatch.setattr(witness, "COUNT", 100 * witness.COUNT)
    begin = time.perf_counter()
    for _ in range(2):  # the round before the first answer may have begun earlier
        ours.send(None)
        told = ours.recv()
    monkeypatch.undo()
    assert overlap((begin, time.perf_counter()), told)
    ours.send(None)
    assert not overlap(told[-1], ours.recv())
    ours.close()  # ends the thread
    thread.join(20)


def test_to_wait_for_a_core_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 1.0)  # as while others have the core
    (begin, end), seconds = witness._round()
    assert begin < end
    assert seconds == 0


def test_a_process_of_its_own_answers() -> None:
    before = time.perf_counter()
    with Witness() as process:
        process.slow_times()
        for begin, end in process.slow_times():
            assert before < begin < end < time.perf_counter()
