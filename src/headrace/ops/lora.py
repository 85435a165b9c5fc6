"""Low-rank adapters beside the base matmuls: many adapters, and rows without one, in a batch.

y_row += scale * (x_row A^T) B, with A [rank, in_features] and B [rank, out_features]: both factors
keep one rank-1 term a row, so that a rank of any size is read in whole, aligned rows and none is
padded to another's. x A^T is summed in float32, times scale, and rounded once to x's dtype; its
product with B is summed in float32 together with y, and rounded once. Rows without an adapter
(slot -1) are left untouched, so they keep their bits.

The factors of all loaded adapters lie in one flat tensor, LoraWeights.memory, in the model's
dtype. A slot is the place of one adapter in the tables that say where its factors begin. The
tables and the memory keep their addresses while adapters come and go, so that a CUDA graph may
hold them; loading an adapter writes memory that no running row reads, then its column of the
tables, on the stream of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops import dispatch
from headrace.ops.arena import Take, fresh
from headrace.ops.embedding import known
from headrace.ops.linear import linear

ALIGNMENT = 128  # elements: every A and every B begins at a multiple of it in the memory


@dataclass(frozen=True)
class LoraSite:
    """Where the factors beside one base matmul lie, for every slot.

    A site has one segment, or, where several matmuls of a checkpoint are one of ours, several that
    lie side by side in y: q, k and v. Each segment has factors of its own, at its own rank.

    Segment s of slot l has A at memory[a[s, l] :], [num_experts, rank, in_features], and B at
    memory[b[s, l] :], [num_experts, rank, widths[s]], both contiguous (dense: num_experts is 1).
    rank[s, l] 0: the adapter leaves the segment alone, and a and b mean nothing.
    Columns of B are in the order of y: for gate_up, gate 2i and up 2i + 1.
    """

    in_features: int
    widths: tuple[int, ...]  # [num_segments] out_features of each segment
    num_experts: int
    a: Tensor  # [num_segments, num_slots] int64: elements into memory, a multiple of ALIGNMENT
    b: Tensor  # [num_segments, num_slots] int64
    rank: Tensor  # [num_segments, num_slots] int32
    scale: Tensor  # [num_segments, num_slots] float32


@dataclass(frozen=True)
class LoraLayer:
    """The sites of one layer of the model."""

    qkv: LoraSite  # three segments
    output: LoraSite
    router: LoraSite
    gate_up: LoraSite  # of experts
    down: LoraSite  # of experts


@dataclass(frozen=True)
class LoraWeights:
    """All adapters on the device; one object for the life of the engine."""

    memory: Tensor  # [num_elements] in the model's dtype
    embedding: LoraSite  # in_features is the vocabulary; x A^T is a column of A
    layers: tuple[LoraLayer, ...]
    lm_head: LoraSite
    max_rank: int  # no segment of any slot exceeds it; what buffers are sized by


@dataclass(frozen=True)
class LoraRows:
    """Which adapter each row of a tensor has, and the rows of each adapter together.

    Worked example with 4 slots and slot_of_row [2, -1, 0, 2]: active [0, 2, -1, -1],
    order [2, 0, 3, 1], starts [0, 1, 3, 3, 3]: rows of slot active[i] are
    order[starts[i] : starts[i + 1]], in rising order; rows without an adapter stand last.
    """

    slot_of_row: Tensor  # [num_rows] int32, -1: none
    order: Tensor  # [num_rows] int32
    active: Tensor  # [num_slots] int32: the slots in use, rising, then -1
    starts: Tensor  # [num_slots + 1] int32


@dataclass(frozen=True)
class LoraBuffers:
    """Where the GPU keeps x A^T: float32, [num_parts, num_segments, num_rows, max_rank].

    All layers of a step may share it, and with it all of their sites. The CPU needs none.
    """

    tokens: Tensor | None = None  # one segment, a row per token
    qkv: Tensor | None = None  # three segments
    pairs: Tensor | None = None  # a row per (token, expert) pair, from pair_parts
    outputs: Tensor | None = None  # a row per row of logits


@dataclass(frozen=True)
class MoELora:
    """What adapters change in one MoE layer (`headrace.ops.moe.moe_layer`) of a step."""

    layer: LoraLayer
    memory: Tensor  # LoraWeights.memory
    rows: LoraRows  # of the tokens
    buffers: LoraBuffers


@dataclass(frozen=True)
class LoraBatch:
    """What a step needs beside the base model; None in its place: no row has an adapter."""

    weights: LoraWeights
    tokens: LoraRows  # of the flat batch
    outputs: LoraRows  # of batch.output_rows, for the LM head


@dataclass(frozen=True)
class LoraStep:
    """One step's deltas, for a model's forward to add where they belong."""

    batch: LoraBatch
    buffers: LoraBuffers

    def add_to_embedding(self, h: Tensor, token_ids: Tensor, sampled: Tensor | None) -> None:
        """To the rows of the embedding, in place; the ids are those of `embed`."""
        weights, parts = self.batch.weights, self.buffers.tokens
        rows = self.batch.tokens
        add_lora_embedding(h, token_ids, weights.embedding, weights.memory, rows, parts, sampled)

    def add_to_qkv(self, layer: int, qkv: Tensor, x: Tensor) -> None:
        """To q, k and v side by side, in place, before RoPE."""
        site, parts = self.batch.weights.layers[layer].qkv, self.buffers.qkv
        weights, rows = self.batch.weights, self.batch.tokens
        add_lora(qkv, x, site, weights.memory, rows, parts, after_linear=True)

    def add_to_output(self, layer: int, h: Tensor, x: Tensor) -> None:
        """To what attention adds to the residual stream, in place."""
        site, parts = self.batch.weights.layers[layer].output, self.buffers.tokens
        weights, rows = self.batch.weights, self.batch.tokens
        add_lora(h, x, site, weights.memory, rows, parts, after_linear=True)

    def moe(self, layer: int) -> MoELora:
        """What `headrace.ops.moe.moe_layer` takes."""
        weights = self.batch.weights
        return MoELora(weights.layers[layer], weights.memory, self.batch.tokens, self.buffers)

    def add_to_lm_head(self, logits: Tensor, x: Tensor) -> None:
        """To the logits, in place."""
        weights, parts = self.batch.weights, self.buffers.outputs
        rows = self.batch.outputs
        add_lora(logits, x, weights.lm_head, weights.memory, rows, parts, after_linear=True)


def router_tensors(lora: MoELora | None) -> tuple[Tensor | None, ...]:
    """The adapters of a layer's router as its kernels take them; None six times: there are none.

    Returns slot_of_row, the memory, and the router's a, b, rank and scale.
    """
    if lora is None:
        return (None,) * 6
    site = lora.layer.router
    return lora.rows.slot_of_row, lora.memory, site.a, site.b, site.rank, site.scale


def lora_buffers(
    take: Take, num_tokens: int, num_outputs: int, top_k: int, max_rank: int
) -> LoraBuffers:
    """Buffers of a step on the GPU."""
    from headrace.ops.lora_kernel import low_rank_parts, pair_parts

    return LoraBuffers(
        tokens=low_rank_parts(take, 1, num_tokens, max_rank),
        qkv=low_rank_parts(take, 3, num_tokens, max_rank),
        pairs=pair_parts(take, num_tokens * top_k, max_rank),
        outputs=low_rank_parts(take, 1, num_outputs, max_rank),
    )


def most_in_parts(top_k: int) -> tuple[int, int]:
    """The most tokens, and rows of logits, whose x A^T takes several parts in `lora_buffers`."""
    from headrace.ops.lora_kernel import FEW_PAIRS, FEW_TOKENS

    return FEW_PAIRS // top_k, FEW_TOKENS


def add_lora(
    y: Tensor,  # [num_rows, sum(widths)], changed in place
    x: Tensor,  # [num_rows, in_features]
    site: LoraSite,
    memory: Tensor,  # LoraWeights.memory
    rows: LoraRows,
    parts: Tensor | None = None,  # of LoraBuffers, on the GPU
    after_linear: bool = False,
) -> Tensor:
    """y += scale (x A^T) B for the rows with an adapter, each segment in its columns.

    Returns y. A row's result does not depend on the rows beside it. after_linear: nothing was
    launched since the `linear` of this x, so that a GPU may compute x A^T beside it.
    """
    if dispatch.takes_kernel(y):
        from headrace.ops.lora_kernel import add_lora_kernel

        parts = own_parts(site, len(x), memory.device) if parts is None else parts
        return add_lora_kernel(y, x, site, memory, rows, parts, after_linear)
    for slot, chosen in _rows_of_slots(rows):
        begin = 0
        for segment, width in enumerate(site.widths):
            if int(site.rank[segment, slot]):
                a, b = _factors(site, memory, segment, slot, 0)
                shrunk = _shrink(x[chosen], a, site.scale[segment, slot])
                _expand(y[:, begin : begin + width], chosen, shrunk, b)
            begin += width
    return y


def add_lora_embedding(
    y: Tensor,  # [num_tokens, hidden], changed in place
    token_ids: Tensor,  # [num_tokens] int64
    site: LoraSite,
    memory: Tensor,
    rows: LoraRows,
    parts: Tensor | None = None,  # of LoraBuffers, on the GPU
    sampled: Tensor | None = None,  # [max_num_seqs] int64; None: every id is known
) -> Tensor:
    """y += scale A[:, token]^T B for the rows with an adapter. Returns y.

    An id of -1 - i stands for sampled[i].
    """
    if dispatch.takes_kernel(y):
        from headrace.ops.lora_kernel import add_lora_embedding_kernel

        parts = own_parts(site, len(y), memory.device) if parts is None else parts
        return add_lora_embedding_kernel(y, token_ids, site, memory, rows, parts, sampled)
    token_ids = known(token_ids, sampled)
    for slot, chosen in _rows_of_slots(rows):
        if int(site.rank[0, slot]):
            a, b = _factors(site, memory, 0, slot, 0)
            shrunk = (a[:, token_ids[chosen]].T.float() * site.scale[0, slot]).to(memory.dtype)
            _expand(y, chosen, shrunk, b)
    return y


def add_expert_lora(
    y: Tensor,  # [num_pairs, width], changed in place: one row a (token, expert) pair
    x: Tensor,  # [num_pairs, in_features]
    expert_of_row: Tensor,  # [num_pairs] int64
    slot_of_row: Tensor,  # [num_pairs] int32, -1: none
    site: LoraSite,
    memory: Tensor,
    parts: Tensor | None = None,  # from own_parts, on the GPU
) -> Tensor:
    """y += scale (x A_e^T) B_e with the expert and the adapter of each row. Returns y.

    For gate_up before the activation, for down before the routing weight. On the GPU these are
    steps of the base matmuls (`headrace.ops.lora_kernel`); this is for few rows there.
    """
    if dispatch.takes_kernel(y):
        from headrace.ops.lora_kernel import add_expert_lora_kernel

        parts = own_parts(site, len(y), memory.device) if parts is None else parts
        return add_expert_lora_kernel(y, x, expert_of_row, slot_of_row, site, memory, parts)
    pairs = torch.stack((slot_of_row.long(), expert_of_row), dim=1)
    for slot, expert in pairs[slot_of_row >= 0].unique(dim=0).tolist():
        if int(site.rank[0, slot]):
            chosen = ((pairs[:, 0] == slot) & (pairs[:, 1] == expert)).nonzero().flatten()
            a, b = _factors(site, memory, 0, slot, expert)
            shrunk = _shrink(x[chosen], a, site.scale[0, slot])
            _expand(y, chosen, shrunk, b)
    return y


def own_parts(
    site: LoraSite, num_rows: int, device: torch.device, max_rank: int | None = None
) -> Tensor:
    """A buffer outside any arena; without max_rank it asks the device for the largest."""
    from headrace.ops.lora_kernel import low_rank_parts

    max_rank = int(site.rank.max()) if max_rank is None else max_rank
    return low_rank_parts(fresh(device), len(site.widths), num_rows, max_rank)


def _rows_of_slots(rows: LoraRows) -> Iterator[tuple[int, Tensor]]:
    starts = rows.starts.tolist()
    for i, slot in enumerate(rows.active.tolist()):
        if slot < 0:
            return
        yield slot, rows.order[starts[i] : starts[i + 1]].long()


def _factors(
    site: LoraSite, memory: Tensor, segment: int, slot: int, expert: int
) -> tuple[Tensor, Tensor]:
    """A [rank, in_features] and B [rank, width] of one expert (dense: expert 0)."""
    rank, width = int(site.rank[segment, slot]), site.widths[segment]
    a = int(site.a[segment, slot]) + expert * rank * site.in_features
    b = int(site.b[segment, slot]) + expert * rank * width
    return (
        memory[a : a + rank * site.in_features].view(rank, site.in_features),
        memory[b : b + rank * width].view(rank, width),
    )


def _shrink(x: Tensor, a: Tensor, scale: Tensor) -> Tensor:
    """scale (x A^T), [num_rows, rank] in x's dtype."""
    return (linear(x.float(), a.float()) * scale).to(x.dtype)


def _expand(y: Tensor, chosen: Tensor, shrunk: Tensor, b: Tensor) -> None:
    """y[chosen] += shrunk B, summed in float32 and rounded once."""
    y[chosen] = (y[chosen].float() + linear(shrunk.float(), b.T.float())).to(y.dtype)
