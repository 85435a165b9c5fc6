"""Copies between host and device that neither side waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of 4- or 8-byte numbers on the device, in one copy; tensors of the same dtypes.

    Their pinned memory comes from torch's cache, which hands it out again after the copy.
    """
    order = sorted(range(len(arrays)), key=lambda i: -arrays[i].itemsize)  # keeps 8 bytes aligned
    words = [np.ascontiguousarray(arrays[i]).reshape(-1).view(np.int32) for i in order]
    num_words = sum(map(len, words))
    packed = torch.empty(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate(words, out=packed.numpy())
    parts = packed.to(device, non_blocking=True).split([len(w) for w in words])
    placed = dict(zip(order, parts, strict=True))
    return [
        placed[i].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for i, array in enumerate(arrays)
    ]


class Download:
    """Tensors on their way to the host; `read` waits for them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # non-blocking: into pinned memory
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event = None
        if any(tensor.is_cuda for tensor in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
