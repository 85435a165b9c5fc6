"""A process that does nothing but count: it tells when the whole machine was slow."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import statistics
import time
from multiprocessing.connection import Connection
from typing import Self

COUNT = 4000  # additions of a round: about 0.1 ms
WARM_UP = 1000  # rounds that say how long one takes
SLOW = 2.0  # times as long; two threads of one core cost each other less than that

Interval = tuple[float, float]  # of time.perf_counter()


class Witness:
    """Shares no memory and no files with the program, so that what slows it is the machine.

    Where a machine is shared, all of its cores may run at a tenth of their speed for some 40 ms,
    once a second. Only its time on a core counts: to wait for one, it may be the program that has
    them all.
    """

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs,), daemon=True)
        self._process.start()
        self._pipe.recv()
        return self

    def slow_times(self) -> list[Interval]:
        """When the machine was slow, since the last call."""
        self._pipe.send(None)
        return self._pipe.recv()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def overlap(interval: Interval, others: list[Interval]) -> bool:
    """Whether an interval meets one of the others."""
    begin, end = interval
    return any(first < end and begin < last for first, last in others)


def _main(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this
    with contextlib.suppress(EOFError, BrokenPipeError):  # or is gone
        _watch(pipe)


def _watch(pipe: Connection) -> None:
    usual = statistics.median(_round()[1] for _ in range(WARM_UP))
    pipe.send(None)
    slow: list[Interval] = []
    while True:
        interval, seconds = _round()
        if seconds > SLOW * usual:
            slow.append(interval)
        if pipe.poll():
            pipe.recv()
            pipe.send(slow)
            slow = []


def _round() -> tuple[Interval, float]:
    """When it was, and its seconds on a core."""
    begin, begin_on_core = time.perf_counter(), time.thread_time()
    total = 0
    for i in range(COUNT):
        total += i
    seconds = time.thread_time() - begin_on_core
    return (begin, time.perf_counter()), seconds
