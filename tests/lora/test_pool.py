"""Turns: who is released when, with loads that end when the test says so."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import ConfigError
from headrace.lora.adapter import Adapter
from headrace.lora.factors import Factors
from headrace.lora.load import Lora
from headrace.lora.loader import Loader, Stamp
from headrace.lora.memory import LoraMemory, aligned
from headrace.lora.peft_config import parse_peft_config
from headrace.lora.pool import LoraPool
from headrace.lora.targets import Site, Target

UNIT = 2 * aligned(1)  # elements of an adapter of rank 1 or so: A and B take a unit of memory each
SITES = tuple(Site((Target(str(i), 1, 1),)) for i in range(7))  # one layer between its ends
CONFIG = parse_peft_config({"peft_type": "LORA", "r": 1})


class SlowLoader(Loader):
    """Copies end so many ticks after they began; all else is done at once."""

    def __init__(self, memory: LoraMemory, sizes: dict[str, int], ticks: int) -> None:
        super().__init__(memory, lambda name: torch.empty(0))
        self._sizes = sizes
        self._ticks = ticks
        self._copying: list[tuple[int, Future[Any], Adapter]] = []
        self.now = 0

    def read(self, path: Path) -> Future[tuple[Stamp, Adapter]]:
        # the adapter changes so many of the layer's targets
        keys = [site.targets[0].key for site in SITES[1 : 1 + self._sizes[path.name]]]
        factors = {key: Factors(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 1.0) for key in keys}
        return done(((0, 0), Adapter(path, CONFIG, factors, ())))

    def copy(self, source: Any, *_: Any) -> Future[Adapter]:
        assert isinstance(source, Adapter)
        future: Future[Adapter] = Future()
        self._copying.append((self.now + self._ticks, future, source))
        return future

    def keep(self, adapter: Adapter) -> Future[Adapter]:
        return done(adapter)

    def tick(self) -> None:
        self.now += 1
        for end, future, adapter in self._copying:
            if end <= self.now and not future.done():
                future.set_result(adapter)


def done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


@dataclass(eq=False)
class Work:
    """A request that runs for so many ticks."""

    lora: Lora[Any]
    ticks: int
    born: int
    released: int | None = None


class Machine:
    """The pool and a scheduler that runs up to `width` requests, first released first."""

    def __init__(
        self, sizes: dict[str, int], slots: int, room: int, width: int, ticks: int
    ) -> None:
        memory = LoraMemory(SITES, slots, 1, room * UNIT, torch.float32, torch.device("cpu"))
        self.loader = SlowLoader(memory, sizes, ticks)
        self.pool: LoraPool[Work] = LoraPool(memory, self.loader, len(sizes))
        self.width = width
        self.waiting: deque[Work] = deque()
        self.running: list[Work] = []
        self.parked: list[Work] = []
        self.finished: list[Work] = []
        for name in sizes:
            self.pool.load(name, Path(name))
        while self.pool.is_loading:
            self.tick()
        assert set(self.pool.names) == set(sizes)

    def arrive(self, name: str, ticks: int) -> Work:
        lora = self.pool.names[name]
        work = Work(lora, ticks, self.loader.now)
        if self.pool.arrive(lora, work):
            self._release(work)
        else:
            self.parked.append(work)
        return work

    def abort(self, work: Work) -> None:
        for queue in (self.waiting, self.running, self.parked):
            if work in queue:
                queue.remove(work)
                assert self.pool.leave(work.lora, work) == (queue is self.parked)

    def tick(self) -> None:
        self.loader.tick()
        news = self.pool.advance()
        for work in news.released:
            self.parked.remove(work)
            self._release(work)
        while self.waiting and len(self.running) < self.width:
            self.running.append(self.waiting.popleft())
        for work in list(self.running):
            assert work.lora.ready
            assert work.lora.slot is not None
            work.ticks -= 1
            if work.ticks == 0:
                self.running.remove(work)
                self.finished.append(work)
                assert not self.pool.leave(work.lora, work)
        self.pool.check()

    def _release(self, work: Work) -> None:
        work.released = self.loader.now
        self.waiting.append(work)

    @property
    def num_left(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.parked)


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 6), st.booleans(), st.integers(0, 3)), max_size=40
)


@settings(max_examples=80, deadline=None)
@given(
    arrivals=ARRIVALS,
    sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6),
    slots=st.integers(1, 4),
    room=st.integers(5, 12),
    width=st.integers(1, 4),
    ticks=st.integers(1, 4),
)
def test_every_request_ends(
    arrivals: list[tuple[int, int, bool, int]],
    sizes: list[int],
    slots: int,
    room: int,
    width: int,
    ticks: int,
) -> None:
    machine = Machine({str(i): n for i, n in enumerate(sizes)}, slots, room, width, ticks)
    works = []
    for which, length, aborts, pause in arrivals:
        works.append(machine.arrive(str(which), length))
        if aborts:
            machine.abort(works[len(works) // 2])
        for _ in range(pause):
            machine.tick()
    # all in turn, each with a copy of its own, is the slowest that may be
    for _ in range(sum(length for _, length, _, _ in arrivals) + len(arrivals) * (ticks + 2)):
        machine.tick()
    assert machine.num_left == 0
    assert not machine.pool.is_loading
    assert all(not lora.holders and not lora.parked for lora in machine.pool.names.values())


@pytest.mark.parametrize("cold_size", [1, 5])
def test_a_cold_adapter_is_not_starved_by_hot_ones(cold_size: int) -> None:
    """Hot ones get a new request each tick; the cold one waits for those that run, and a copy."""
    hot = [str(i) for i in range(4)]
    machine = Machine(dict.fromkeys(hot, 2) | {"cold": cold_size}, 4, 8, 64, ticks=3)
    for _ in range(10):
        for name in hot:
            machine.arrive(name, 5)
        machine.tick()
    cold = machine.arrive("cold", 1)
    for _ in range(12):
        for name in hot:
            machine.arrive(name, 5)
        machine.tick()
    assert cold.released is not None
    assert cold.released - cold.born <= 5 + 3 + 2
    for _ in range(40):
        machine.tick()
    assert machine.num_left == 0


def test_adapters_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before has its place then, or was let go: each holds a file, and memory."""
    machine = Machine({"first": 1}, 1, 1, 1, ticks=1)
    reads: list[Future[Any]] = []

    def read(path: Path) -> Future[Any]:
        reads.append(Future())
        return reads[-1]

    monkeypatch.setattr(machine.loader, "read", read)
    for name in "abc":
        machine.pool.load(name, Path(name))
    for number in (1, 2, 3):
        machine.tick()
        machine.tick()
        assert len(reads) == number
        reads[-1].set_exception(ConfigError("there is none"))
    machine.tick()
    assert not machine.pool.is_loading
    assert list(machine.pool.names) == ["first"]


def test_what_was_let_go_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory to keep an adapter while it is copied; when that ends, there is.

    What is let go loses its memory: kept, it would be zeros, and the device would get them later.
    """
    machine = Machine({"first": 1}, 1, 1, 1, ticks=5)
    keeps: list[Future[Adapter]] = []
    gone: list[Adapter] = []

    def keep(adapter: Adapter) -> Future[Adapter]:
        assert all(adapter is not other for other in gone)
        keeps.append(Future())
        return keeps[-1]

    monkeypatch.setattr(machine.loader, "keep", keep)
    monkeypatch.setattr(machine.loader, "drop", gone.append)
    machine.pool._cpu._max_loras += 1
    machine.loader._sizes["second"] = 1
    machine.pool.load("second", Path("second"))
    while "second" not in machine.pool.names:
        machine.tick()
    machine.arrive("second", 1)
    machine.tick()  # it is copied now
    keeps[0].set_exception(MemoryError())
    while machine.num_left:
        machine.tick()
    read = machine.pool.names["second"].adapter
    assert len(keeps) == 2
    assert read is not None
    keeps[1].set_result(read)
    machine.tick()
    assert machine.pool.names["second"] in machine.pool._cpu


def test_what_gathers_shares_a_turn() -> None:
    """All at once for six adapters over two slots: a copy for each, not for each request."""
    names = [str(i) for i in range(6)]
    machine = Machine(dict.fromkeys(names, 1), 2, 2, 4, ticks=2)
    before = machine.pool.num_copies
    for _ in range(20):
        for name in names:
            machine.arrive(name, 3)
    while machine.num_left:
        machine.tick()
    assert len(machine.finished) == 120
    assert machine.pool.num_copies - before == 4  # two were there from the start


def test_others_go_on_while_one_waits() -> None:
    machine = Machine({"a": 1, "b": 1, "c": 1}, 2, 2, 8, ticks=5)
    resident = [lora.name for lora in machine.pool.resident]
    [absent] = {"a", "b", "c"} - set(resident)
    long = machine.arrive(resident[0], 50)
    waits = machine.arrive(absent, 1)
    for _ in range(6):
        machine.tick()
    assert waits.released is not None  # in the place of the one that nobody used
    assert machine.running == [long]
    assert long.ticks == 44


def test_room_in_pieces_is_no_room() -> None:
    """One adapter in the middle stays busy: with the others gone there is room, but in pieces."""
    machine = Machine(dict.fromkeys("0123", 2) | {"cold": 5}, 5, 8, 64, ticks=1)
    assert machine.pool.names["1"].placement is not None
    assert machine.pool.names["1"].placement.ranges[0][0] == 2 * UNIT
    cold = None
    for now in range(40):
        machine.arrive("1", 5)
        if now == 10:
            cold = machine.arrive("cold", 1)
        machine.tick()
    assert cold is not None
    assert cold.released is not None
