"""From the scheduler's plan to logits: the flat batch and the model's forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine.adapters import LoraStaging
from headrace.engine.flat_rows import FlatRows
from headrace.engine.graphs import Graphs, graph_sizes
from headrace.engine.request import Request
from headrace.engine.scheduler import Plan
from headrace.engine.staging import Staging
from headrace.models import Batch, KVGroup, Model
from headrace.ops.attention_plan import AttentionPlan, empty_plan, plan_attention, plan_shape
from headrace.ops.lora import LoraBatch, LoraWeights


class Runner:
    """Owns the cache tensors and the tokens sampled last, and calls the model.

    On a GPU, steps that only decode are replayed from graphs once `capture` was called.
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
        self._max_blocks = -(-max_model_len // block_size)
        num_groups = len(layout.windows)
        most_rows = max(config.max_num_batched_tokens, self.max_num_seqs)
        largest = FlatRows.capacities(most_rows, self.max_num_seqs, self._max_blocks, num_groups)
        self._staging = Staging(largest, device)
        self._plans = [self._make_plan(window, config) for window in layout.windows]
        self._lora = None if lora is None else LoraStaging(lora, most_rows, device)
        self._graphs: dict[bool, Graphs] = {}  # by whether rows may have adapters

    @torch.inference_mode()
    def capture(self, on_progress: Callable[[int, int], None]) -> None:
        """Capture the decode steps of every size; with --enable-lora, with adapters too."""
        self._graphs = {False: Graphs()} | ({True: Graphs()} if self._lora else {})
        sizes = graph_sizes(self.max_num_seqs)
        # the largest takes the pool's memory
        todo = [(size, kind) for size in reversed(sizes) for kind in self._graphs]
        for done, (size, has_lora) in enumerate(todo):
            on_progress(done, len(todo))
            rows = FlatRows.idle(size, len(self._plans))
            lora = None
            if has_lora and self._lora:
                lora = self._lora.put_slots(np.full(size, -1), range(size))
            batch = self._batch(rows, self._fixed(size), lora)
            self._graphs[has_lora].capture(size, partial(self.model.forward, batch))
        on_progress(len(todo), len(todo))

    @torch.inference_mode()
    def forward(
        self,
        plan: Plan,
        output_rows: Sequence[int],  # [num_outputs] rows of the flat batch
    ) -> Tensor:  # [num_outputs, vocab] fp32, overwritten by the next step
        """Compute the planned tokens."""
        work = list(plan.items())
        only_decoding = len(output_rows) == len(work) == sum(plan.values())
        graphs = self._graphs.get(any(request.lora for request in plan))
        if graphs and only_decoding and (size := graphs.size_for(len(work))):
            # padded with copies of the last row: they compute, and write, what it does
            padded = work + [work[-1]] * (size - len(work))
            rows = FlatRows.of(padded, range(size), self.block_size)
            self._batch(rows, self._fixed(size), self._lora_batch(padded, range(size)))
            return graphs.replay(size)[: len(work)]
        rows = FlatRows.of(work, output_rows, self.block_size)
        return self.model.forward(self._batch(rows, lora=self._lora_batch(work, output_rows)))

    def _lora_batch(
        self, work: Sequence[tuple[Request, int]], output_rows: Sequence[int]
    ) -> LoraBatch | None:
        """Which rows have which adapter; None if no row has one: that step is the base model's."""
        if self._lora is None or not any(request.lora for request, _ in work):
            return None
        return self._lora.put(work, output_rows)

    def _batch(
        self,
        rows: FlatRows,
        capacities: Sequence[int] | None = None,
        lora: LoraBatch | None = None,
    ) -> Batch:
        """The rows on the device, at addresses that depend on the capacities only."""
        staged = self._staging.put(rows.arrays(), capacities)
        token_ids, positions, query_start, seq_lens, output_rows, *groups = staged
        num_groups = len(self._plans)
        for plan in filter(None, self._plans):
            lengths = np.diff(rows.query_start)
            words = plan_attention(lengths, rows.seq_lens, plan.window, plan.shape)
            self._staging.copy(words, plan.words)
        return Batch(
            token_ids=token_ids,
            positions=positions,
            query_start=query_start,
            seq_lens=seq_lens,
            groups=tuple(
                KVGroup(table.T, slots, window, plan)
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

    def _fixed(self, size: int) -> list[int]:
        """Bytes set aside for each array of a decode step of one graph."""
        return FlatRows.capacities(size, size, self._max_blocks, len(self._plans))

    def _make_plan(self, window: int, config: EngineConfig) -> AttentionPlan | None:
        layout, device = self.model.kv_layout, self.model.device
        if device.type == "cpu":
            return None
        shape = plan_shape(
            config.max_num_batched_tokens,
            config.max_num_seqs,
            layout.num_heads,
            layout.num_kv_heads,
            layout.head_dim,
            torch.cuda.get_device_properties(device).multi_processor_count,
        )
        return empty_plan(shape, window, device)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their memory is taken as it is written (torch.zeros writes all of it).

    Zeros and not torch.empty: attention may gather whole pages, and 0 * NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
