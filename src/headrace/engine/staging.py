"""Host arrays on their way to the device: pinned blocks in turns, few copies, seldom a wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256  # bytes between the starts of two arrays
EXTRA = 1 << 22  # bytes of the pinned blocks for `copy`: attention plans of 100,000s of tokens


class Staging:
    """Puts the arrays of a step on the device.

    Arrays with the same capacities get the same addresses, which a captured CUDA graph relies on.
    Two pinned blocks take turns: while the device still copies a step's block, the host fills the
    next one, and before the one after that it waits until the first step has ended.
    """

    def __init__(self, capacities: Sequence[int], device: torch.device) -> None:
        self._device = device
        if device.type != "cpu":
            num_bytes = _starts(capacities)[-1]
            self._block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._hosts = [
                torch.empty(num_bytes + EXTRA, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
            self._steps = [torch.cuda.Event() for _ in range(2)]  # when each block's step ends
            self._end = 0

    def put(
        self,
        arrays: Sequence[np.ndarray],
        capacities: Sequence[int] | None = None,  # bytes set aside for each, by default its own
    ) -> list[Tensor]:
        """Begin a step: its arrays as tensors on the device, valid until the next step's."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        host, sizes = self._next_host(), [array.nbytes for array in arrays]
        capacities = capacities or sizes
        fits = all(size <= room for size, room in zip(sizes, capacities, strict=True))
        assert fits, f"{sizes=} {capacities=}"
        starts = _starts(capacities)
        self._end = starts[-1]
        assert self._end <= len(self._block), f"{self._end} bytes, {len(self._block)=}"
        for array, start in zip(arrays, starts, strict=False):
            _fill(host, start, array)
        for begin, end in _runs(starts, sizes):
            self._block[begin:end].copy_(host[begin:end], non_blocking=True)
        return [
            self._block[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
            for array, start in zip(arrays, starts, strict=False)
        ]

    def copy(self, array: np.ndarray, to: Tensor) -> None:
        """Copy one more array of the step to the front of a tensor on the device."""
        if self._device.type == "cpu":
            to[: array.size].copy_(torch.from_numpy(array))
            return
        begin, host = self._end, self._hosts[0]
        self._end = _starts([begin, array.nbytes])[-1]
        _fill(host, begin, array)
        source = host[begin : begin + array.nbytes].view(to.dtype)
        to[: len(source)].copy_(source, non_blocking=True)

    def _next_host(self) -> Tensor:
        """The other pinned block, as soon as the device no longer needs it.

        Seldom a wait: only prompts in chunks, of which no token is read, let the host run ahead.
        """
        self._steps[0].record()
        self._hosts.reverse()
        self._steps.reverse()
        self._steps[0].synchronize()
        return self._hosts[0]


def _starts(capacities: Sequence[int]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    starts = [0]
    for capacity in capacities:
        starts.append(starts[-1] + -(-capacity // ALIGNMENT) * ALIGNMENT)
    return starts


def _fill(host: Tensor, start: int, array: np.ndarray) -> None:
    host.numpy()[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view("u1")


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def _runs(starts: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Byte ranges to copy: one for neighbours that leave no more than their alignment unused."""
    runs: list[tuple[int, int]] = []
    for start, size in zip(starts, sizes, strict=False):
        if runs and start - runs[-1][1] < ALIGNMENT:
            runs[-1] = runs[-1][0], start + size
        elif size:
            runs.append((start, start + size))
    return runs
