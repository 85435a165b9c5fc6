"""Host arrays on their way to the device: one pinned block and one copy a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256  # bytes between the starts of two arrays


class Staging:
    """Puts the arrays of a step on the device.

    Arrays of the same capacities in the same order get the same addresses, which a captured CUDA
    graph relies on. Two pinned blocks take turns: while the device still copies a step's block,
    the host fills the next one. A third step must not begin before the first has ended.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        if device.type != "cpu":
            self._block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._hosts = [torch.empty(num_bytes, dtype=torch.uint8).pin_memory() for _ in "ab"]

    def put(
        self,
        arrays: Sequence[np.ndarray],
        capacities: Sequence[int] | None = None,  # bytes set aside for each, by default its own
    ) -> list[Tensor]:
        """The arrays as tensors on the device, valid until the next put."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        self._hosts.reverse()
        sizes = [array.nbytes for array in arrays]
        starts = self._starts(capacities or sizes)
        block = self._hosts[0].numpy()
        for array, start in zip(arrays, starts, strict=True):
            block[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view("u1")
        for begin, end in _runs(starts, sizes):
            self._block[begin:end].copy_(self._hosts[0][begin:end], non_blocking=True)
        return [
            self._block[start : start + array.nbytes]
            .view(torch.from_numpy(array[:0]).dtype)
            .view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]

    def _starts(self, capacities: Sequence[int]) -> list[int]:
        ends = np.cumsum([-(-size // ALIGNMENT) * ALIGNMENT for size in capacities])
        assert ends[-1] <= len(self._block), f"{ends[-1]} bytes of arrays, {len(self._block)=}"
        return [0, *ends[:-1].tolist()]


def _runs(starts: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Byte ranges to copy: one for all neighbours that leave no unused capacity between them."""
    runs: list[tuple[int, int]] = []
    for start, size in zip(starts, sizes, strict=True):
        if runs and start - runs[-1][1] < ALIGNMENT:
            runs[-1] = runs[-1][0], start + size
        else:
            runs.append((start, start + size))
    return runs
