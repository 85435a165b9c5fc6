"""How often each token occurs in a request, kept on the device for the penalties."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headrace.engine.request import Request
from headrace.engine.transfer import upload

FIRST_SLOTS = 8  # slots of the first allocation; doubled when they are used up


class TokenCounts:
    """A row of counts for each request with penalties, from its first step to its release.

    The host fills a row when the request first needs it, from all tokens before the one that is
    to be sampled; later tokens are added on the device, which has them before the host.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        # 2 * times in the output + (1 if in the prompt)
        self.counts = torch.empty(0, vocab_size, dtype=torch.int32, device=device)
        self._slots: dict[Request, int] = {}
        self._free: list[int] = []

    def slot(self, request: Request) -> int:
        """The request's row of `counts`."""
        slot = self._slots.get(request)
        if slot is None:
            assert not request.num_in_flight, "some of its tokens are not known to the host"
            if not self._free:
                self._grow()
            slot = self._slots[request] = self._free.pop()
            [row] = upload([self._count(request)], self.counts.device)
            self.counts[slot] = row
        return slot

    def add(self, slots: Tensor, token_ids: Tensor) -> None:  # both [num_penalized] int64
        """Count one more output token of each slot."""
        places = slots * self.counts.shape[1] + token_ids
        self.counts.view(-1).index_add_(0, places, torch.full_like(places, 2, dtype=torch.int32))

    def release(self, request: Request) -> None:
        """Forget a request, if it is known."""
        if request in self._slots:
            self._free.append(self._slots.pop(request))

    def _count(self, request: Request) -> np.ndarray:  # [vocab] int32
        tokens = np.array(request.token_ids)
        prompt, output = tokens[: request.prompt_len], tokens[request.prompt_len :]
        counts = 2 * np.bincount(output, minlength=self.counts.shape[1])
        counts[prompt] += 1
        return counts.astype(np.int32)

    def _grow(self) -> None:
        old, vocab_size = self.counts.shape
        new = max(FIRST_SLOTS, old)
        self.counts = torch.cat([self.counts, self.counts.new_empty(new, vocab_size)])
        self._free += range(old, old + new)
