"""Tensors of any size on their way to the device, beside running steps."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

BLOCK_BYTES = 2**22  # a step's own copies wait for one of these at most


class Uploader:
    """Copies through two pinned blocks: while the device takes one, the host fills the other.

    They are pinned once. To pin an adapter would take longer than to copy it, and holds up every
    launch of the process meanwhile; a copy of memory that is not pinned does so, too. The memory on
    the device is taken once, too: the driver lets no kernel be launched while it looks for some.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """num_bytes: of the largest tensor."""
        self._copy = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        pin = device.type == "cuda"
        blocks = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._turns = cycle([(block, torch.cuda.Event() if pin else None) for block in blocks])

    def upload(self, source: Tensor) -> Tensor:
        """A copy with the same strides, on the current stream, until the next upload.

        source has no gaps.
        """
        order = source.as_strided((source.numel(),), (1,)).view(torch.uint8)
        copy = self._copy[: source.nbytes]
        for part, target in zip(order.split(BLOCK_BYTES), copy.split(BLOCK_BYTES), strict=True):
            block, copied = next(self._turns)
            if copied is not None:
                copied.synchronize()
            block[: len(part)].copy_(part)
            target.copy_(block[: len(part)], non_blocking=True)
            if copied is not None:
                copied.record()
        return copy.view(source.dtype).as_strided(source.shape, source.stride())
