"""Pieces of files straight to the memory of a device, read by many threads at once.

A thread reads a chunk into memory that the GPU can copy from (pinned), starts the copy on a stream
of its own and waits for it: disk, page cache and bus all stay busy, and the host needs no more than
a chunk a thread.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 2**24
MAX_THREADS = 16


@dataclass(frozen=True)
class FilePiece:
    """Bytes of a file that make a tensor."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PendingTensor:
    """A tensor on its way."""

    tensor: Tensor
    chunks: list[Future[None]]

    def wait(self) -> Tensor:
        """The tensor, with all its bytes. Raises OSError if the file is too short or unreadable."""
        wait(self.chunks)
        for chunk in self.chunks:
            chunk.result()
        return self.tensor


class FileReader:
    """A pool of threads with a staging buffer each. What is started first arrives first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))

    def start(self, piece: FilePiece) -> PendingTensor:
        """Take memory on the device and have it filled."""
        tensor = torch.empty(piece.shape, dtype=piece.dtype, device=self._device)
        flat = tensor.flatten().view(torch.uint8)
        # the memory may have been another tensor's, which kernels on this stream still read
        free = torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None
        chunks = [
            self._pool.submit(self._fill, flat[at : at + CHUNK_BYTES], piece, at, free)
            for at in range(0, len(flat), CHUNK_BYTES)
        ]
        return PendingTensor(tensor, chunks)

    def close(self) -> None:
        """End the threads; their buffers are given back."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @torch.inference_mode()  # also tensors that were made in it are filled
    def _fill(
        self, target: Tensor, piece: FilePiece, at: int, free: torch.cuda.Event | None
    ) -> None:
        staging = self._staging()[: len(target)]
        read_exactly(piece.path, staging, piece.offset + at)
        if free is None:
            target.copy_(staging)
            return
        with torch.cuda.stream(self._own.stream):
            self._own.stream.wait_event(free)
            target.copy_(staging, non_blocking=True)
            self._own.stream.synchronize()  # the buffer is this thread's next chunk's

    def _staging(self) -> Tensor:
        """This thread's buffer."""
        if not hasattr(self._own, "staging"):
            self._own.staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu)
            self._own.stream = torch.cuda.Stream(self._device) if self._on_gpu else None
        return self._own.staging


def read_exactly(path: Path, target: Tensor, offset: int) -> None:
    """Fill target, uint8 on the host, from the file. Raises OSError if the file ends before."""
    view = memoryview(target.numpy().data)
    with path.open("rb", buffering=0) as file:
        while view:
            count = os.preadv(file.fileno(), [view], offset)
            if count == 0:
                raise OSError(f"{path} ends at byte {offset}")
            view, offset = view[count:], offset + count
