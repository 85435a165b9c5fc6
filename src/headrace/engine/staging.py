"""Host arrays on their way to the device: pinned blocks in turns, one launch, seldom a wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256  # bytes between the starts of two arrays
EXTRA = 1 << 22  # bytes of the pinned blocks for `more`: attention plans of 100,000s of tokens
MOST_ARRAYS = 32  # of a step


class Staging:
    """Puts the arrays of a step on the device.

    Arrays with the same capacities get the same addresses, which a captured CUDA graph relies on.
    Two pinned blocks take turns: while the device still reads a step's block, the host fills the
    next one, and before the one after that it waits until the first step has ended.
    """

    def __init__(self, capacities: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._sizes: object = None  # of the last step's arrays
        self._placed: list[Tensor] = []
        if device.type != "cpu":
            num_bytes = _starts(capacities)[-1]
            self._block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._hosts = [_HostBlock(num_bytes + EXTRA) for _ in range(2)]
            self._steps = [torch.cuda.Event() for _ in range(2)]  # when each block's step ends

    def put(
        self,
        arrays: Sequence[np.ndarray],
        capacities: Sequence[int] | None = None,  # bytes set aside for each, by default its own
        more: Sequence[tuple[np.ndarray, Tensor]] = (),
    ) -> list[Tensor]:
        """Begin a step: its arrays as tensors on the device, valid until the next step's.

        The arrays of `more` are written to the front of their tensors.
        """
        if self._device.type == "cpu":
            for array, tensor in more:
                tensor[: array.size].copy_(torch.from_numpy(array))
            return [torch.from_numpy(array) for array in arrays]
        placed = self._places(arrays, capacities or [array.nbytes for array in arrays])
        host = self._next_host()
        host.move([*zip(arrays, placed, strict=True), *more])
        return placed

    def _places(self, arrays: Sequence[np.ndarray], capacities: Sequence[int]) -> list[Tensor]:
        """Where the arrays go: tensors on the device that nobody has written yet."""
        sizes = [(a.shape, a.dtype, room) for a, room in zip(arrays, capacities, strict=True)]
        if sizes != self._sizes:  # making them gives Python to other threads dozens of times
            fits = all(a.nbytes <= room for a, room in zip(arrays, capacities, strict=True))
            assert fits, f"{sizes=}"
            starts = _starts(capacities)
            assert starts[-1] <= len(self._block), f"{starts[-1]} bytes, {len(self._block)=}"
            self._placed = [
                self._block[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
                for array, start in zip(arrays, starts, strict=False)
            ]
            self._sizes = sizes
        return self._placed

    def _next_host(self) -> _HostBlock:
        """The other pinned block, as soon as the device no longer needs it.

        Seldom a wait: only prompts in chunks, of which no token is read, let the host run ahead.
        """
        self._steps[0].record()
        self._hosts.reverse()
        self._steps.reverse()
        self._steps[0].synchronize()
        return self._hosts[0]


class _HostBlock:
    """Pinned memory that the GPU reads: a table, and the words of arrays."""

    def __init__(self, num_bytes: int, pinned: bool = True) -> None:
        from headrace.ops.move_kernel import COLUMNS

        self._table = torch.empty(MOST_ARRAYS, COLUMNS, dtype=torch.int64, pin_memory=pinned)
        self._words = torch.empty(num_bytes // 4, dtype=torch.int32, pin_memory=pinned)

    def move(self, arrays: Sequence[tuple[np.ndarray, Tensor]]) -> None:
        """Launch what writes each array to the front of its tensor."""
        from headrace.ops.move_kernel import move

        table, words = self._table.numpy(), self._words.numpy()
        starts = _starts([array.nbytes for array, _ in arrays])[:-1]
        used = table[: len(arrays)]
        for row, start, (array, tensor) in zip(used, starts, arrays, strict=True):
            source = np.ascontiguousarray(array).reshape(-1).view(np.int32)
            words[start // 4 : start // 4 + source.size] = source
            row[:] = start // 4, tensor.data_ptr(), source.size
        move(self._table[: len(arrays)], self._words, int(used[:, 2].max()))


def _starts(capacities: Sequence[int]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    starts = [0]
    for capacity in capacities:
        starts.append(starts[-1] + -(-capacity // ALIGNMENT) * ALIGNMENT)
    return starts


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
