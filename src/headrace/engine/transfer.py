"""Copies between host and device that neither side waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; kernels compiled for aligned pointers need not be compiled again


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """One-dimensional arrays as tensors on the device, in one copy.

    Their pinned memory comes from torch's cache, which hands it out again after the copy.
    """
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays])
    starts = [0, *ends[:-1].tolist()]
    packed = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = packed.numpy()
    for array, start in zip(arrays, starts, strict=True):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).view("u1")
    placed = packed.to(device, non_blocking=True)
    return [
        placed[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for array, start in zip(arrays, starts, strict=True)
    ]


class Download:
    """Tensors on their way to the host; `read` waits for them.

    With a stream of its own it holds up nothing that is launched after it: whoever overwrites the
    tensors calls `hold` before.
    """

    def __init__(self, tensors: Sequence[Tensor], stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._event = None
        if any(tensor.is_cuda for tensor in tensors):
            self._event = torch.cuda.Event()
        self._source = tensors  # whose memory goes to nobody else meanwhile
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # non-blocking: into pinned memory. A copy on the CPU too: the next step overwrites its
            # own samples
            self._tensors = [tensor.to("cpu", non_blocking=True, copy=True) for tensor in tensors]
            if self._event is not None:
                self._event.record()

    def hold(self) -> None:
        """Let the device begin what is launched from now on when it has copied the tensors."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def read(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
