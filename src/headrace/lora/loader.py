"""The threads that bring adapters from disk to the device and to CPU memory."""

from __future__ import annotations

import ctypes
import logging
import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.config import ConfigError
from headrace.lora.adapter import CONFIG_NAME, TENSORS_NAME, Adapter, BaseTensor, read_adapter
from headrace.lora.check import check_adapter
from headrace.lora.memory import LoraMemory, Placement
from headrace.lora.threads import compute_alone

log = logging.getLogger(__name__)

_madvise = ctypes.CDLL(None).madvise  # ctypes lets other threads go on meanwhile
_madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

Stamp = tuple[int, ...]  # changes when a file of an adapter is written again or replaced


@dataclass(frozen=True)
class Files:
    """An adapter that has to be read again, from files that must be as they were."""

    path: Path
    stamp: Stamp


class Loader:
    """Reads and copies on one thread, and beside it keeps what was read in CPU memory.

    On the GPU it copies on a stream of its own, so that the steps go on.
    """

    def __init__(self, memory: LoraMemory, base: BaseTensor) -> None:
        self._memory = memory
        self._base = base
        self._loading = ThreadPoolExecutor(1, "lora-loader", compute_alone)
        self._keeping = ThreadPoolExecutor(1, "lora-keeper", compute_alone)
        device = memory.weights.memory.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, path: Path) -> Future[tuple[Stamp, Adapter]]:
        """The adapter of a directory, mapped from its files, and the stamp of what was read."""
        return self._loading.submit(self._read, path)

    def copy(
        self, source: Adapter | Files, slot: int, placement: Placement, checked: bool
    ) -> Future[Adapter]:
        """Write an adapter to its place, once no launched step can still read what was there.

        checked: the self-check has passed before.
        """
        launched = torch.cuda.current_stream().record_event() if self._stream else None
        return self._loading.submit(self._copy, source, slot, placement, checked, launched)

    def keep(self, adapter: Adapter) -> Future[Adapter]:
        """A copy in CPU memory, from where the device can fetch it without the files."""
        return self._keeping.submit(adapter.owned)

    def drop(self, adapter: Adapter) -> None:
        """Give back the memory of an adapter that nobody asks for again.

        Left to Python, that would stop all of its threads, the one of the steps too: a tenth of a
        second for 1.5 GB. Copies that were begun may read it: this comes after them.
        """
        self._loading.submit(_drop, adapter)

    def _read(self, path: Path) -> tuple[Stamp, Adapter]:
        targets = self._memory.targets.values()
        stamp = file_stamp(path)
        with torch.cuda.stream(self._stream):  # base tensors are compared there, beside the steps
            adapter = read_adapter(path, targets, self._base, self._memory.weights.max_rank)
        if file_stamp(path) != stamp:
            raise ConfigError(f"{path} changed while it was read; load it again")
        return stamp, adapter

    def _read_again(self, files: Files) -> Adapter:
        if file_stamp(files.path) == files.stamp:
            stamp, adapter = self._read(files.path)
            if stamp == files.stamp:
                return adapter
        raise ConfigError(f"{files.path} has changed since it was loaded; load it again, in place")

    def _copy(
        self,
        source: Adapter | Files,
        slot: int,
        placement: Placement,
        checked: bool,
        launched: torch.cuda.Event | None,
    ) -> Adapter:
        adapter = self._read_again(source) if isinstance(source, Files) else source
        try:
            self._write(adapter, slot, placement, checked, launched)
        except BaseException:
            if adapter is not source:
                _drop(adapter)  # the error may be kept, and what it saw with it
            raise
        return adapter

    def _write(
        self,
        adapter: Adapter,
        slot: int,
        placement: Placement,
        checked: bool,
        launched: torch.cuda.Event | None,
    ) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            if self._stream is not None and launched is not None:
                self._stream.wait_event(launched)
            self._memory.write(placement, adapter.factors)
            if not checked:
                alone = self._memory.alone(slot, placement, adapter.factors)
                result = check_adapter(alone, self._memory.sites, slot, adapter)
                log.info("adapter %s: %s", adapter.path, result)
            if self._stream is not None:
                self._stream.synchronize()


def _drop(adapter: Adapter) -> None:
    for factors in adapter.factors.values():
        give_pages_back(factors.a)
        give_pages_back(factors.b)
    if adapter.lease is not None:
        adapter.lease.end()


def give_pages_back(tensor: Tensor) -> None:
    """Take the memory from under a tensor without gaps: reads as the file again, or as zeros."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        _madvise(begin, end - begin, mmap.MADV_DONTNEED)


def file_stamp(path: Path) -> Stamp:
    """Of each of an adapter's files: its last change, in ns, and its size; zeros if it is missing.

    A file that takes the place of another one may have its time of writing, but not of change.
    """
    stamp: list[int] = []
    for file in (path / CONFIG_NAME, path / TENSORS_NAME):
        stat = file.stat() if file.exists() else None
        stamp += (stat.st_ctime_ns, stat.st_size) if stat else (0, 0)
    return tuple(stamp)
