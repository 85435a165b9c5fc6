"""From the scheduler's plan to logits: the flat batch and the model's forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine.request import Request
from headrace.engine.scheduler import Plan
from headrace.engine.staging import Staging
from headrace.models import Batch, KVGroup, Model

STAGED_ROW = 64  # bytes of a row's own fields, at most


class Runner:
    """Owns the cache tensors and the tokens sampled last, and calls the model."""

    def __init__(
        self,
        model: Model,
        num_pages: Sequence[int],
        config: EngineConfig,
        max_model_len: int,
    ) -> None:
        self.model = model
        self.block_size = block_size = config.block_size
        layout = model.kv_layout
        page = block_size, layout.num_kv_heads, layout.head_dim
        self.kv_cache = tuple(
            lazy_zeros((2, num_pages[g], *page), model.dtype, model.device)
            for g in layout.group_of_layer
        )
        self.sampled = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=model.device)
        max_blocks = -(-max_model_len // block_size)
        tables = len(layout.windows) * config.max_num_seqs * max_blocks * np.dtype("i4").itemsize
        self._staging = Staging(tables + config.max_num_batched_tokens * STAGED_ROW, model.device)

    @torch.inference_mode()
    def forward(
        self,
        plan: Plan,
        output_rows: Sequence[int],  # [num_outputs] rows of the flat batch
    ) -> Tensor:  # [num_outputs, vocab] fp32
        """Compute the planned tokens."""
        return self.model.forward(self.build_batch(plan, output_rows))

    def build_batch(self, plan: Plan, output_rows: Sequence[int]) -> Batch:
        """Lay the planned tokens of all requests one after the other, on the device."""
        rows = FlatRows.of(list(plan.items()), output_rows, self.block_size)
        staged = self._staging.put(rows.arrays())
        token_ids, positions, query_start, seq_lens, output, *groups = staged
        windows = self.model.kv_layout.windows
        return Batch(
            token_ids=token_ids,
            positions=positions,
            query_start=query_start,
            seq_lens=seq_lens,
            groups=tuple(
                KVGroup(table.T, slots, window)
                for slots, table, window in zip(groups[::2], groups[1::2], windows, strict=True)
            ),
            output_rows=output,
            sampled=self.sampled,
            kv_cache=self.kv_cache,
        )


@dataclass(frozen=True)
class FlatRows:
    """The host's side of a Batch. Block tables lie block by block, so that a table of fewer
    blocks is the beginning of a larger one."""

    token_ids: np.ndarray  # [num_tokens] int64
    positions: np.ndarray  # [num_tokens] int64
    query_start: np.ndarray  # [num_seqs + 1] int32
    seq_lens: np.ndarray  # [num_seqs] int32
    output_rows: np.ndarray  # [num_outputs] int64
    slots: list[np.ndarray]  # [num_groups] of [num_tokens] int64
    block_tables: list[np.ndarray]  # [num_groups] of [max_blocks, num_seqs] int32, padded with -1

    @staticmethod
    def of(
        work: Sequence[tuple[Request, int]], output_rows: Sequence[int], block_size: int
    ) -> FlatRows:
        """The rows of (request, number of tokens), one request after the other."""
        starts = np.array([request.num_computed for request, _ in work])
        counts = np.array([n for _, n in work])
        query_start = np.concatenate(([0], counts.cumsum()))
        positions = np.repeat(starts - query_start[:-1], counts) + np.arange(query_start[-1])
        blocks, offsets = np.divmod(positions, block_size)
        seqs = np.repeat(np.arange(len(work)), counts)
        tables = [
            block_table([request.block_tables[g] for request, _ in work])
            for g in range(len(work[0][0].block_tables))
        ]
        return FlatRows(
            token_ids=np.concatenate([request.next_tokens(n) for request, n in work]),
            positions=positions,
            query_start=query_start.astype(np.int32),
            seq_lens=(starts + counts).astype(np.int32),
            output_rows=np.array(output_rows, dtype=np.int64),
            slots=[table[blocks, seqs] * np.int64(block_size) + offsets for table in tables],
            block_tables=tables,
        )

    def arrays(self) -> list[np.ndarray]:
        """All arrays, in a fixed order: the block tables, whose size changes most, come last."""
        groups = [a for pair in zip(self.slots, self.block_tables, strict=True) for a in pair]
        fixed = [self.token_ids, self.positions, self.query_start, self.seq_lens, self.output_rows]
        return fixed + groups


def block_table(tables: Sequence[Sequence[int]]) -> np.ndarray:  # [max_blocks, num_seqs] int32
    """Pages of each sequence as a column, padded with -1."""
    padded = np.full((len(tables), max(map(len, tables))), -1, dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return np.ascontiguousarray(padded.T)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their memory is taken as it is written (torch.zeros writes all of it).

    Zeros and not torch.empty: attention may gather whole pages, and 0 * NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
