"""Which adapters there are, which of them are on the device, and whose turn is next.

An adapter is read into CPU memory, and copied into a slot of the device when requests wait for it.
Requests of an adapter in its slot go to the scheduler at once and hold the adapter there; those of
another one are parked here. When an adapter is wanted and there is no room, the adapters that
nobody holds leave first, the longest unused ahead. If that is not enough, as many adapters as are
wanted are closed, those with the fewest holders first: a closed adapter takes no new requests, and
leaves when those it has are done. So every wait is bounded by the work that is already there, and
whatever gathers for an adapter meanwhile shares its next turn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Generic

from headrace.config import ConfigError
from headrace.lora.adapter import Adapter
from headrace.lora.cpu_tier import CpuTier
from headrace.lora.load import Lora, R, error_text
from headrace.lora.loader import Files, Loader, Stamp
from headrace.lora.memory import LoraMemory, sizes_of

log = logging.getLogger(__name__)


@dataclass
class PoolNews(Generic[R]):
    """What happened since the last look."""

    released: list[R] = field(default_factory=list)  # their adapter is ready now
    failed: list[tuple[R, str]] = field(default_factory=list)  # it can't be loaded any more
    moved: list[tuple[R, Lora[R]]] = field(default_factory=list)  # to the load that replaced theirs
    loads: list[tuple[str, Exception | None]] = field(default_factory=list)  # by name


class LoraPool(Generic[R]):
    """All adapters of an engine. Its methods belong to one thread; others load.

    Whatever goes wrong in a load is told to those who wait for it, and is not the engine's end.
    """

    def __init__(self, memory: LoraMemory, loader: Loader, max_cpu_loras: int) -> None:
        self.memory = memory
        self.names: dict[str, Lora[R]] = {}
        self.resident: list[Lora[R]] = []  # on the device or on their way to it
        self.num_copies = 0  # to the device, since the start
        self._capacity = memory.ranges.num_free
        self._free_slots = list(range(memory.num_slots))
        self._wanted: list[Lora[R]] = []  # have parked requests, in order of the first of them
        self._cpu = CpuTier[R](loader, max_cpu_loras)
        self._loader = loader
        self._reads: dict[str, Path] = {}  # by name, in the order in which they were asked for
        self._reading: Future[tuple[Stamp, Adapter]] | None = None  # the first of them
        self._copies: dict[Lora[R], Future[Adapter]] = {}
        self._announced: set[Lora[R]] = set()  # loads told with the end of their first copy
        self._uids, self._clock = count(1), count(1)

    # What the engine asks for

    def load(self, name: str, path: Path, in_place: bool = False) -> None:
        """Begin to read an adapter; advance() tells how it ended. ConfigError if the name is taken.

        in_place replaces the adapter of that name: requests that are there keep the old one.
        """
        is_loading = name in self._reads or any(x.name == name for x in self._announced)
        if is_loading or (name in self.names and not in_place):
            reason = "unload it first, or set load_inplace to replace it"
            raise ConfigError(f"the LoRA adapter '{name}' is already loaded; {reason}")
        self._reads[name] = path

    def unload(self, name: str) -> None:
        """Forget a name; its memory is free when its last request is done."""
        self._retire(self.names.pop(name))

    def arrive(self, lora: Lora[R], request: R) -> bool:
        """Whether a new request may go to the scheduler now; else it is parked here."""
        lora.last_used = next(self._clock)
        if lora.ready and not lora.closed:
            lora.holders += 1
            return True
        lora.parked.append(request)
        if lora not in self._wanted:
            self._wanted.append(lora)
        return False

    def leave(self, lora: Lora[R], request: R) -> bool:
        """Forget a request, done or not. Returns whether it was parked here."""
        parked = request in lora.parked
        if parked:
            lora.parked.remove(request)
            if not lora.parked:
                self._wanted.remove(lora)
        else:
            lora.holders -= 1
            assert lora.holders >= 0, lora
        if lora.retired:
            self._drop_if_idle(lora)
        return parked

    def advance(self) -> PoolNews[R]:
        """Take note of what has been loaded, and begin what can be: call it before each step."""
        news: PoolNews[R] = PoolNews()
        if self._reading is not None and self._reading.done():
            self._finish_read(self._reading, news)
            self._reading = None
        for lora in [x for x, f in self._copies.items() if f.done()]:
            self._finish_copy(lora, self._copies.pop(lora), news)
        for lora in self._cpu.take_kept():
            self._finish_keep(lora)
        self._serve_wanted(news)
        if self._reads and self._reading is None:
            # one at a time: each holds a file and memory, and the next request's copy waits for it
            self._reading = self._loader.read(next(iter(self._reads.values())))
        return news

    @property
    def is_loading(self) -> bool:
        """Whether advance() will have something to tell without anything else happening."""
        return bool(self._reads or self._copies or self._cpu.futures)

    def wait(self, seconds: float) -> None:
        """Sleep until a load ends, or for that long."""
        futures: list[Future] = [*self._copies.values(), *self._cpu.futures]
        if self._reading is not None:
            futures.append(self._reading)
        wait(futures, seconds, return_when="FIRST_COMPLETED")

    def check(self) -> None:
        """Assert that slots and memory are either free or an adapter's."""
        slots = [*self._free_slots, *(lora.slot for lora in self.resident)]
        assert len(slots) == self.memory.num_slots, slots
        assert set(slots) == set(range(self.memory.num_slots)), slots
        held = sum(lora.size for lora in self.resident)
        assert held + self.memory.ranges.num_free == self._capacity, held
        assert all(lora.parked for lora in self._wanted), self._wanted

    # Reading

    def _finish_read(self, future: Future[tuple[Stamp, Adapter]], news: PoolNews[R]) -> None:
        """Make an adapter known; if there is room, try it on the device before that is told."""
        name, path = next(iter(self._reads.items()))
        del self._reads[name]
        try:
            stamp, adapter = future.result()
        except Exception as error:
            news.loads.append((name, error))
            return
        sizes = sizes_of(adapter.factors)
        lora = Lora[R](next(self._uids), name, path, sizes, stamp, adapter)
        if lora.size > self._capacity:
            news.loads.append((name, self._too_large(lora)))
            self._cpu.let_go(lora)
            return
        log.info("adapter %s: %d targets, rank %d", name, len(sizes), adapter.max_rank)
        for warning in adapter.warnings:
            log.warning("adapter %s: %s", name, warning)
        if not self._wanted and self._free_slots and self._place(lora):
            self._announced.add(lora)
            self._begin_copy(lora)
            return
        if self._cpu.has_room:
            self._cpu.keep(lora, adapter)
        else:
            self._cpu.let_go(lora)  # it stays on disk until it is wanted
        self._announce(lora, news)

    def _too_large(self, lora: Lora[R]) -> ConfigError:
        itemsize = self.memory.weights.memory.itemsize
        return ConfigError(
            f"the adapter takes {lora.size * itemsize} bytes; "
            f"--lora-memory holds {self._capacity * itemsize}: give as many, or more"
        )

    def _announce(self, lora: Lora[R], news: PoolNews[R]) -> None:
        """From now on requests of this name get this load."""
        if lora.name in self.names:
            self._retire(self.names[lora.name])
        self.names[lora.name] = lora
        news.loads.append((lora.name, None))

    def _finish_keep(self, lora: Lora[R]) -> None:
        """The newest copy stays, if anybody may still want it."""
        if lora.retired:
            self._drop_if_idle(lora)
        if lora.adapter is not None:
            lora.last_used = next(self._clock)
            self._cpu.hold(lora)

    # Turns

    def _serve_wanted(self, news: PoolNews[R]) -> None:
        """Give room to the wanted adapters in their order; the first without room holds up all.

        A small adapter must not slip past a large one for ever.
        """
        waiting = list(self._wanted)
        for i, lora in enumerate(waiting):
            if lora in self.resident:
                if lora.ready:  # it was closed for one that no longer waits
                    lora.closed = False
                    self._release(lora, news)
            elif self._make_room(lora):
                self._begin_copy(lora)
            else:
                self._close_for(waiting[i:])
                return

    def _make_room(self, lora: Lora[R]) -> bool:
        """Take a slot and memory, if need be of adapters that nobody holds."""
        idle = sorted((x for x in self.resident if x.is_idle), key=lambda x: x.last_used)
        room = self.memory.ranges.num_free + sum(x.size for x in idle)
        if room < lora.size or not (self._free_slots or idle):
            return False
        while not self._free_slots or not self._place(lora):
            if not idle:
                return False
            self._evict(idle.pop(0))
        return True

    def _place(self, lora: Lora[R]) -> bool:
        lora.placement = self.memory.place(lora.sizes)
        if lora.placement is None:
            return False
        lora.slot = self._free_slots.pop()
        self.resident.append(lora)
        return True

    def _close_for(self, waiting: Iterable[Lora[R]]) -> None:
        """Close as many adapters as those that wait need the room of."""
        absent = [x for x in waiting if x not in self.resident]
        leaving = [x for x in self.resident if x.closed or x.is_idle]
        staying = [x for x in self.resident if x not in leaving]
        staying.sort(key=lambda x: (x.holders + len(x.parked), x.last_used))
        slots = len(self._free_slots) + len(leaving)
        room = self.memory.ranges.num_free + sum(x.size for x in leaving)
        needed = sum(x.size for x in absent)
        for victim in staying:
            # at least one: the room that there is may be in pieces
            if leaving and slots >= len(absent) and room >= needed:
                return
            victim.closed = True
            leaving.append(victim)
            slots += 1
            room += victim.size

    def _release(self, lora: Lora[R], news: PoolNews[R]) -> None:
        """Hand an adapter's parked requests to the scheduler."""
        if lora.parked:
            self._wanted.remove(lora)
        lora.holders += len(lora.parked)
        news.released += lora.parked
        lora.parked.clear()

    def _evict(self, lora: Lora[R]) -> None:
        """Free the slot of an adapter that nobody holds."""
        assert lora.is_idle, lora
        assert lora.placement is not None, lora
        assert lora.slot is not None, lora
        self.memory.free(lora.placement)
        self._free_slots.append(lora.slot)
        self.resident.remove(lora)
        lora.slot = lora.placement = None
        lora.ready = lora.closed = False

    def _retire(self, lora: Lora[R]) -> None:
        lora.retired = True
        self._drop_if_idle(lora)

    def _drop_if_idle(self, lora: Lora[R]) -> None:
        """Free all memory of an unloaded adapter whose requests are done."""
        if lora.holders or lora.parked or lora.is_copying or self._cpu.is_keeping(lora):
            return
        if lora in self.resident:
            self._evict(lora)
        self._cpu.let_go(lora)

    # Copying

    def _begin_copy(self, lora: Lora[R]) -> None:
        """Fill the place of an adapter."""
        assert lora.placement is not None, lora
        assert lora.slot is not None, lora
        source = lora.adapter or Files(lora.path, lora.stamp)
        self.num_copies += 1
        self._copies[lora] = self._loader.copy(source, lora.slot, lora.placement, lora.checked)

    def _finish_copy(self, lora: Lora[R], future: Future[Adapter], news: PoolNews[R]) -> None:
        """Open a slot whose adapter has arrived, or give the place back."""
        assert lora.slot is not None, lora
        assert lora.placement is not None, lora
        lora.ready = True  # or else its place can be given back
        try:
            adapter = future.result()
        except Exception as error:
            self._give_up(lora, error, news)
        else:
            self.memory.publish(lora.slot, lora.placement, adapter.factors)
            lora.checked = True
            if lora not in self._cpu:
                self._cpu.keep(lora, adapter)
            if lora in self._announced:
                self._announce(lora, news)
            self._release(lora, news)
        self._announced.discard(lora)
        if lora.retired:
            self._drop_if_idle(lora)

    def _give_up(self, lora: Lora[R], error: Exception, news: PoolNews[R]) -> None:
        """Fail those that wait for an adapter that can't be copied; others may try again."""
        reason = f"the LoRA adapter '{lora.name}' could not be loaded: {error_text(error)}"
        log.error("%s", reason)
        if lora in self._announced:
            news.loads.append((lora.name, error))
        if lora.parked:
            self._wanted.remove(lora)
        later = self.names.get(lora.name) if lora.retired else None
        for request in lora.parked:
            if later is None:
                news.failed.append((request, reason))
            else:  # that has replaced it, and perhaps its files
                news.moved.append((request, later))
                news.released += [request] if self.arrive(later, request) else []
        lora.parked.clear()
        self._evict(lora)
        if lora not in self._cpu:
            self._cpu.let_go(lora)  # the error may be kept, and what it saw with it
