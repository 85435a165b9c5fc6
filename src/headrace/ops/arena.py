"""Memory for a step's intermediate tensors: taken once at start, dealt out again every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes; as the CUDA allocator aligns

Take = Callable[[Sequence[int], torch.dtype], Tensor]  # (shape, dtype) -> uninitialised tensor


class Arena:
    """One block of bytes, dealt out from its start.

    The same requests in the same order get the same addresses, so that a captured CUDA graph and
    a later step may share them.
    """

    def __init__(self, num_bytes: int, device: torch.device | str) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._used = 0

    def reset(self) -> None:
        """Deal from the start again; tensors taken before are about to be overwritten."""
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor. Raises MemoryError if the block is used up."""
        end = self._used + math.prod(shape) * dtype.itemsize
        if end > len(self._bytes):
            raise MemoryError(
                f"a {dtype} tensor of shape {tuple(shape)} needs {end} bytes of the arena, "
                f"which has {len(self._bytes)}"
            )
        found = self._bytes[self._used : end].view(dtype).view(tuple(shape))
        self._used = _aligned(end)
        return found


class ArenaSize:
    """Stands in for an arena to learn how large it must be: its tensors have no memory."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the meta device; counts its bytes."""
        self.num_bytes = _aligned(self.num_bytes + math.prod(shape) * dtype.itemsize)
        return torch.empty(tuple(shape), dtype=dtype, device="meta")


def fresh(device: torch.device | str) -> Take:
    """Tensors of their own, outside any arena."""

    def take(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    return take


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
