"""A paged KV cache by hand, to drive a model's forward without the engine.

Pages are handed out in a scrambled order and filled with NaN before use, and again once a window
has passed them, so that a read of a wrong page shows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headrace.models import Batch, KVGroup, Model
from headrace.ops import dispatch
from headrace.ops.attention_plan import AttentionPlan, empty_plan, plan_shape

NUM_PAGES = 512


class PagedSequences:
    """Several token sequences in one cache; `step` runs the next rows of some of them."""

    def __init__(self, model: Model, num_seqs: int, block_size: int = 4) -> None:
        layout = model.kv_layout
        self.model = model
        self.block_size = block_size
        self.lengths = [0] * num_seqs
        shape = (2, NUM_PAGES, block_size, layout.num_kv_heads, layout.head_dim)
        self.cache = tuple(
            torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)
            for _ in range(layout.num_layers)
        )
        self.tables: list[list[list[int]]] = [[[] for _ in range(num_seqs)] for _ in layout.windows]
        generator = torch.Generator().manual_seed(0)
        self.free = [torch.randperm(NUM_PAGES, generator=generator).tolist() for _ in self.tables]

    def step(self, rows: dict[int, list[int]], output_rows: list[int] | None = None) -> Tensor:
        """Append rows[s] to sequence s; logits of the rows asked for, or of every row."""
        for seq, tokens in rows.items():
            self.lengths[seq] += len(tokens)
        groups = [self._group(g, rows) for g in range(len(self.tables))]
        positions = [p for seq in rows for p in self._positions(seq, rows)]
        starts = torch.tensor([0, *(len(tokens) for tokens in rows.values())]).cumsum(0)
        wanted = range(len(positions)) if output_rows is None else output_rows
        device = self.model.device
        batch = Batch(
            token_ids=torch.tensor([t for r in rows.values() for t in r], device=device),
            positions=torch.tensor(positions, device=device),
            query_start=starts.int().to(device),
            seq_lens=torch.tensor([self.lengths[s] for s in rows], device=device).int(),
            groups=tuple(groups),
            output_rows=torch.tensor(wanted, device=device),
            kv_cache=self.cache,
        )
        logits = self.model.forward(batch)
        assert logits.dtype == torch.float32
        self._free_passed_pages()
        return logits

    def _positions(self, seq: int, rows: dict[int, list[int]]) -> range:
        return range(self.lengths[seq] - len(rows[seq]), self.lengths[seq])

    def _group(self, group: int, rows: dict[int, list[int]]) -> KVGroup:
        tables = self.tables[group]
        for seq in rows:
            while len(tables[seq]) * self.block_size < self.lengths[seq]:
                tables[seq].append(self.free[group].pop())
        width = max(len(tables[seq]) for seq in rows)
        padded = [tables[seq] + [-1] * (width - len(tables[seq])) for seq in rows]
        slots = [
            tables[seq][p // self.block_size] * self.block_size + p % self.block_size
            for seq in rows
            for p in self._positions(seq, rows)
        ]
        device = self.model.device
        return KVGroup(
            block_table=torch.tensor(padded, device=device).int(),
            slots=torch.tensor(slots, device=device),
            window=self.model.kv_layout.windows[group],
            plan=self._plan(group, rows) if dispatch.takes_kernel(self.cache[0]) else None,
        )

    def _plan(self, group: int, rows: dict[int, list[int]]) -> AttentionPlan:
        layout, query_lens = self.model.kv_layout, np.array([len(t) for t in rows.values()])
        heads = layout.num_heads, layout.num_kv_heads, layout.head_dim
        shape = plan_shape(int(query_lens.sum()), len(rows), *heads)
        plan = empty_plan(shape, layout.windows[group], self.model.device)
        return plan.fill(query_lens, np.array([self.lengths[seq] for seq in rows]))

    def _free_passed_pages(self) -> None:
        for group, window in enumerate(self.model.kv_layout.windows):
            for seq, table in enumerate(self.tables[group]):
                first_needed = self.lengths[seq] - window + 1  # by the next token's query
                for block in range(first_needed // self.block_size if window else 0):
                    if table[block] >= 0:
                        self._release(group, table[block])
                        table[block] = -1

    def _release(self, group: int, page: int) -> None:
        for cache, of_layer in zip(self.cache, self.model.kv_layout.group_of_layer, strict=True):
            if of_layer == group:
                cache[:, page] = torch.nan
        self.free[group].insert(0, page)


def logits_of(model: Model, tokens: list[int], chunk: int | None = None) -> Tensor:
    """Logits of one sequence, [len(tokens), vocab_size], in chunks of so many rows."""
    sequences = PagedSequences(model, 1)
    step = chunk or len(tokens)
    chunks = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    return torch.cat([sequences.step({0: c}) for c in chunks])


def generate_greedily(model: Model, prompt: list[int], num_tokens: int) -> list[int]:
    """Tokens after the prompt, each the most likely one."""
    sequences = PagedSequences(model, 1)
    tokens: list[int] = []
    rows = prompt
    while len(tokens) < num_tokens:
        tokens.append(int(sequences.step({0: rows})[-1].argmax()))
        rows = tokens[-1:]
    return tokens
