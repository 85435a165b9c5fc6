"""From the scheduler's plan to logits: the flat batch and the model's forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine.flat_rows import FlatRows
from headrace.engine.graphs import Graphs, chunk_sizes, graph_sizes
from headrace.engine.lora_rows import LoraStaging, slots_of
from headrace.engine.scheduler import MAX_SCORED_ROWS, Plan
from headrace.engine.staging import Staging
from headrace.models import Batch, KVGroup, Model
from headrace.ops import dispatch
from headrace.ops.attention_plan import AttentionPlan, empty_plan, plan_attention, plan_shape
from headrace.ops.lora import LoraWeights

MOST_CHUNK_OUTPUTS = 128  # rows of logits of a step with chunks that is replayed from a graph
NO_ADAPTER = np.empty(0, dtype=np.int32)  # slots of a step that might have had some


class Runner:
    """Owns the cache tensors and the tokens sampled last, and calls the model.

    On a GPU, once `capture` was called, steps are replayed from graphs: those that only decode, and
    those with chunks of prompts that are not too large.
    """

    def __init__(
        self,
        model: Model,
        num_pages: Sequence[int],
        config: EngineConfig,
        max_model_len: int,
        lora: LoraWeights | None = None,  # with --enable-lora
    ) -> None:
        self.model = model
        self.block_size = block_size = config.block_size
        self.max_num_seqs = config.max_num_seqs
        layout, device = model.kv_layout, model.device
        page = block_size, layout.num_kv_heads, layout.head_dim
        self.kv_cache = tuple(
            lazy_zeros((2, num_pages[g], *page), model.dtype, device) for g in layout.group_of_layer
        )
        self.sampled = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)
        num_groups = len(layout.windows)
        self._max_num_tokens = config.max_num_batched_tokens
        # the sequence that pads a step may be longer than a request
        longest = max(max_model_len, chunk_sizes(self._max_num_tokens, lora is not None)[-1])
        self._max_blocks = -(-longest // block_size)
        most_rows = max(self._max_num_tokens, self.max_num_seqs)
        self._num_chunk_outputs = min(self.max_num_seqs, MOST_CHUNK_OUTPUTS)
        most_seqs = self.max_num_seqs + 1  # one that pads
        largest = FlatRows.capacities(most_rows, most_seqs, self._max_blocks, num_groups)
        self._staging = Staging(largest, device)
        self._plans = [self._make_plan(window, config) for window in layout.windows]
        self._lora = None if lora is None else LoraStaging(lora, most_rows, device)
        # by whether rows may have adapters
        self._decode_graphs: dict[bool, Graphs] = {}
        self._chunk_graphs: dict[bool, Graphs] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the steps of every size; with --enable-lora, with adapters too."""
        for has_lora in {False, self._lora is not None}:
            decode = self._decode_graphs[has_lora] = Graphs()
            for size in graph_sizes(self.max_num_seqs):
                batch = self._idle_decode(size, has_lora)
                decode.capture(size, partial(self.model.forward, batch))
            chunks = self._chunk_graphs[has_lora] = Graphs()
            for size in chunk_sizes(self._max_num_tokens, has_lora):
                batch = self._idle_chunk(size, has_lora)
                chunks.capture(size, partial(self.model.forward, batch))

    @torch.inference_mode()
    def dry_run(self) -> None:
        """One step of every kind, so that whoever watches sees every kernel that steps launch."""
        model = self.model.first_layers()
        sizes, num_groups = graph_sizes(self.max_num_seqs), len(self._plans)
        most_outputs = self.max_num_seqs + MAX_SCORED_ROWS
        chunks = {n - odd for n in doublings(self._max_num_tokens) for odd in (0, 1) if n > odd}
        kinds = {False, self._lora is not None}
        for n in sorted(chunks, reverse=True):  # the kernels of large steps compile longest
            rows = FlatRows.idle(1, n, num_groups, -(-n // self.block_size))
            # as many rows of logits as there can be: those of prompts that are scored
            rows = replace(rows, output_rows=np.arange(min(n, most_outputs)))
            for has_lora in kinds:
                model.forward(self._batch(rows, NO_ADAPTER if has_lora else None))
        for size in sizes:
            for has_lora in kinds:
                model.forward(self._idle_decode(size, has_lora))

    def _idle_decode(self, size: int, has_lora: bool) -> Batch:
        rows = FlatRows.idle(size, 1, len(self._plans))
        return self._decode_batch(rows, NO_ADAPTER if has_lora else None)

    def _idle_chunk(self, size: int, has_lora: bool) -> Batch:
        rows = FlatRows.idle(1, size, len(self._plans), -(-size // self.block_size))
        return self._chunk_batch(rows, NO_ADAPTER if has_lora else None, size)

    @torch.inference_mode()
    def forward(
        self,
        plan: Plan,
        output_rows: Sequence[int],  # [num_outputs] rows of the flat batch
    ) -> Tensor:  # [num_outputs, vocab] fp32, overwritten by the next step
        """Compute the planned tokens."""
        work, num_tokens = list(plan.items()), sum(plan.values())
        has_lora = any(request.lora for request in plan)
        only_decoding = len(output_rows) == len(work) == num_tokens
        if only_decoding and (size := size_in(self._decode_graphs, has_lora, num_tokens)):
            # padded with copies of the last row: they compute, and write, what it does
            padded = work + [work[-1]] * (size - len(work))
            rows = FlatRows.of(padded, range(size), self.block_size)
            self._decode_batch(rows, slots_of(padded) if has_lora else None)
            return self._decode_graphs[has_lora].replay(size)[: len(work)]
        rows = FlatRows.of(work, output_rows, self.block_size)
        slots = slots_of(work) if has_lora else None
        size = size_in(self._chunk_graphs, has_lora, num_tokens)
        if size and len(output_rows) <= self._num_chunk_outputs:
            self._chunk_batch(rows, slots, size)
            return self._chunk_graphs[has_lora].replay(size)[: len(output_rows)]
        return self.model.forward(self._batch(rows, slots))

    def _decode_batch(self, rows: FlatRows, slots: np.ndarray | None) -> Batch:
        """The rows where the decode graph of as many reads them."""
        size = len(rows.token_ids)
        return self._batch(rows, slots, self._fixed(size, size))

    def _chunk_batch(self, rows: FlatRows, slots: np.ndarray | None, size: int) -> Batch:
        """The rows where the graph of so many tokens reads them, padded by one more sequence."""
        num_seqs = self.max_num_seqs + 1
        rows = rows.padded(size, num_seqs, self._num_chunk_outputs, self.block_size)
        return self._batch(rows, slots, self._fixed(size, num_seqs))

    def _batch(
        self,
        rows: FlatRows,
        slots: np.ndarray | None = None,  # of the first rows' adapters; None: the base model's step
        capacities: Sequence[int] | None = None,
    ) -> Batch:
        """The rows on the device, at addresses that depend on the capacities only."""
        lora = None
        if self._lora is not None and slots is not None:
            lora = self._lora.put(slots, len(rows.token_ids), rows.output_rows)
        lengths, plans = np.diff(rows.query_start), [plan for plan in self._plans if plan]
        words = [plan_attention(lengths, rows.seq_lens, p.window, p.shape) for p in plans]
        more = [(of_plan, plan.words) for of_plan, plan in zip(words, plans, strict=True)]
        staged = self._staging.put(rows.arrays(), capacities, more)
        token_ids, positions, query_start, seq_lens, output_rows, *groups = staged
        num_groups = len(self._plans)
        return Batch(
            token_ids=token_ids,
            positions=positions,
            query_start=query_start,
            seq_lens=seq_lens,
            groups=tuple(
                KVGroup(table.T, slots, window, plan and plan.for_rows(lengths))
                for slots, table, window, plan in zip(
                    groups[:num_groups],
                    groups[num_groups:],
                    self.model.kv_layout.windows,
                    self._plans,
                    strict=True,
                )
            ),
            output_rows=output_rows,
            kv_cache=self.kv_cache,
            sampled=self.sampled,
            lora=lora,
        )

    def _fixed(self, num_tokens: int, num_seqs: int) -> list[int]:
        """Bytes set aside for each array of a step of one graph."""
        return FlatRows.capacities(num_tokens, num_seqs, self._max_blocks, len(self._plans))

    def _make_plan(self, window: int, config: EngineConfig) -> AttentionPlan | None:
        layout, device = self.model.kv_layout, self.model.device
        if not dispatch.takes_kernel(self.sampled):
            return None
        shape = plan_shape(
            config.max_num_batched_tokens,
            config.max_num_seqs + 1,
            layout.num_heads,
            layout.num_kv_heads,
            layout.head_dim,
            dispatch.num_sms(self.sampled),
        )
        return empty_plan(shape, window, device)


def size_in(graphs: dict[bool, Graphs], has_lora: bool, num_tokens: int) -> int | None:
    """The smallest captured size that holds so many tokens."""
    return graphs[has_lora].size_for(num_tokens) if has_lora in graphs else None


def doublings(most: int) -> list[int]:
    """1, 2, 4, ..., and 3 / 2 times each, up to most."""
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({n for p in powers for n in (p, p * 3 // 2) if n <= most} | {most})


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their memory is taken as it is written (torch.zeros writes all of it).

    Zeros and not torch.empty: attention may gather whole pages, and 0 * NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
