"""From the scheduler's plan to logits: the flat batch and the model's forward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.engine.request import Request
from headrace.engine.scheduler import Plan
from headrace.models import Batch, KVGroup, Model


class Runner:
    """Owns the cache tensors and calls the model; a CUDA-graph runner has the same forward."""

    def __init__(self, model: Model, num_pages: Sequence[int], block_size: int) -> None:
        self.model = model
        self.block_size = block_size
        layout = model.kv_layout
        page = block_size, layout.num_kv_heads, layout.head_dim
        self.kv_cache = tuple(
            lazy_zeros((2, num_pages[g], *page), model.dtype, model.device)
            for g in layout.group_of_layer
        )

    @torch.inference_mode()
    def forward(
        self,
        plan: Plan,
        output_rows: Sequence[int],  # [num_outputs] rows of the flat batch
    ) -> Tensor:  # [num_outputs, vocab] fp32
        """Compute the planned tokens."""
        return self.model.forward(self.build_batch(plan, output_rows))

    def build_batch(self, plan: Plan, output_rows: Sequence[int]) -> Batch:
        """Lay the planned tokens of all requests one after the other."""
        chunks = [range(r.num_computed, r.num_computed + n) for r, n in plan.items()]
        positions = np.concatenate([np.arange(c.start, c.stop) for c in chunks])
        tokens = [r.token_ids[c.start : c.stop] for r, c in zip(plan, chunks, strict=True)]
        return Batch(
            token_ids=self._tensor(np.concatenate(tokens), torch.int64),
            positions=self._tensor(positions, torch.int64),
            query_start=self._tensor(np.cumsum([0, *plan.values()]), torch.int32),
            seq_lens=self._tensor(np.array([c.stop for c in chunks]), torch.int32),
            groups=tuple(
                self._group(g, window, list(plan), positions, list(plan.values()))
                for g, window in enumerate(self.model.kv_layout.windows)
            ),
            output_rows=self._tensor(np.array(output_rows, dtype=np.int64), torch.int64),
            kv_cache=self.kv_cache,
        )

    def _group(
        self,
        group: int,
        window: int,
        requests: list[Request],
        positions: np.ndarray,  # [num_tokens]
        num_rows: list[int],  # [num_seqs]
    ) -> KVGroup:
        """Block tables, padded with -1, and the slots that the new tokens go to."""
        tables = [request.block_tables[group] for request in requests]
        padded = np.full((len(tables), max(map(len, tables))), -1, dtype=np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        pages = padded[np.repeat(np.arange(len(tables)), num_rows), positions // self.block_size]
        slots = pages.astype(np.int64) * self.block_size + positions % self.block_size
        return KVGroup(self._tensor(padded, torch.int32), self._tensor(slots, torch.int64), window)

    def _tensor(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(device=self.model.device, dtype=dtype)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their memory is taken as it is written (torch.zeros writes all of it).

    Zeros and not torch.empty: attention may gather whole pages, and 0 * NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
