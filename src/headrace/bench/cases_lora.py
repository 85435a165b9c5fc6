"""LoRA on one layer of gpt-oss-20b: the experts with it, and what it adds to q, k, v and o."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headrace.bench.case import NUM_INPUTS, NUM_WEIGHT_SETS, Case
from headrace.bench.cases_moe import (
    BYTES_PER_EXPERT,
    CHECKED_ROWS,
    HIDDEN,
    INTER,
    TOP_K,
    Step,
    make_step,
    random_layer,
)
from headrace.bench.exact_moe import exact_layer, relative_errors
from headrace.lora.rows import row_arrays
from headrace.ops.arena import fresh
from headrace.ops.lora import (
    LoraBuffers,
    LoraLayer,
    LoraRows,
    LoraSite,
    MoELora,
    add_lora,
    lora_buffers,
)
from headrace.ops.moe import moe_layer

OPS = ("moe_layer_lora", "lora_qkv", "lora_output")
NUM_EXPERTS = 32
QKV_WIDTHS = (4096, 512, 512)
MIXES = ((0, 64), (2, 64), (2, 16), (32, 16))  # (adapters in use, their rank)


@dataclass(frozen=True)
class Adapters:
    """Random adapters of one layer, all of one rank."""

    layer: LoraLayer
    memory: Tensor


@dataclass(frozen=True)
class LoraCase:
    """What the calls of one mix and size read and write."""

    step: Step  # of the base layer
    adapters: Sequence[Adapters]  # call i takes i % 3
    rows: LoraRows
    buffers: LoraBuffers

    def lora(self, i: int) -> MoELora:
        """What call i's expert layer takes."""
        adapters = self.adapters[i % NUM_WEIGHT_SETS]
        return MoELora(adapters.layer, adapters.memory, self.rows, self.buffers)

    def experts(self, i: int) -> Tensor:
        """The expert layer with adapters."""
        step, n = self.step, i % NUM_INPUTS
        layer = step.layers[i % NUM_WEIGHT_SETS]
        return moe_layer(step.inputs[n], layer, step.buffers[n], step.outs[n], self.lora(i))

    def check_experts(self) -> None:
        """The first rows against float64; those without an adapter against the base layer."""
        got = self.experts(0).clone()
        assert torch.equal(got[self.without], self.step.layer(0)[self.without])
        ids = self.step.buffers[0].routing.expert_ids[:CHECKED_ROWS]
        h, layer = self.step.inputs[0][:CHECKED_ROWS], self.step.layers[0]
        expected = exact_layer(h, layer, ids, self.exact_delta)
        largest, rms = relative_errors(got[:CHECKED_ROWS], expected)
        assert largest < 0.025, f"largest error {largest}"
        assert rms < 0.005, f"RMS error {rms}"

    @property
    def without(self) -> Tensor:
        """Whether a row has no adapter."""
        return self.rows.slot_of_row < 0

    def exact_delta(self, matmul: int, x: Tensor, token: Tensor, expert: int) -> Tensor:
        """What adapters add to the expert's first (0) or second (1) matmul, in float64."""
        layer, memory = self.adapters[0].layer, self.adapters[0].memory
        site = (layer.gate_up, layer.down)[matmul]
        return exact_delta(x, site, 0, memory, self.rows.slot_of_row[token], expert)

    def dense(self, name: str, xs: Sequence[Tensor], ys: Sequence[Tensor], i: int) -> Tensor:
        """y += what the adapters add at the site of this name."""
        adapters, n = self.adapters[i % NUM_WEIGHT_SETS], i % NUM_INPUTS
        site = getattr(adapters.layer, name)
        parts = self.buffers.qkv if len(site.widths) > 1 else self.buffers.tokens
        return add_lora(ys[n], xs[n], site, adapters.memory, self.rows, parts)

    def check_dense(self, name: str, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """All rows against float64."""
        ys[0].normal_()
        before = ys[0].clone()
        got = self.dense(name, xs, ys, 0)
        assert torch.equal(got[self.without], before[self.without])
        site, memory = getattr(self.adapters[0].layer, name), self.adapters[0].memory
        slots = self.rows.slot_of_row
        deltas = [
            exact_delta(xs[0].double(), site, segment, memory, slots)
            for segment in range(len(site.widths))
        ]
        expected = before.double() + torch.cat(deltas, 1)
        largest, rms = relative_errors(got, expected)
        assert largest < 0.025, f"largest error {largest}"
        assert rms < 0.005, f"RMS error {rms}"


def cases(sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
    """Every mix; rows take the adapters in turn, and a quarter of them has none."""
    layers = [random_layer(NUM_EXPERTS, device) for _ in range(NUM_WEIGHT_SETS)]
    for num_adapters, rank in MIXES:
        adapters = [random_adapters(max(num_adapters, 1), rank, device) for _ in layers]
        for num_tokens in sizes:
            step = make_step(layers, num_tokens)
            yield from _cases_of(make_case(step, adapters, num_adapters), num_adapters, rank)


def make_case(step: Step, adapters: Sequence[Adapters], num_adapters: int) -> LoraCase:
    """A step whose rows take the adapters in turn."""
    num_tokens, device = len(step.inputs[0]), step.inputs[0].device
    num_slots = adapters[0].layer.qkv.rank.shape[1]
    max_rank = int(adapters[0].layer.qkv.rank.max())

    row = torch.arange(num_tokens)
    slots = row % max(num_adapters, 1)
    slots[(row % 4 == 3) | (num_adapters == 0)] = -1
    buffers = lora_buffers(fresh(device), num_tokens, 1, TOP_K, max_rank)
    return LoraCase(step, adapters, rows_of(slots, num_slots, device), buffers)


def rows_of(slot_of_row: Tensor, num_slots: int, device: torch.device) -> LoraRows:
    """The tables of a batch whose rows have these adapters."""
    arrays = row_arrays(slot_of_row.int().numpy(), num_slots)
    return LoraRows(*(torch.from_numpy(array).to(device) for array in arrays))


def random_adapters(num_slots: int, rank: int, device: torch.device) -> Adapters:
    """Attention and all experts; deltas of the order of a tenth of the base matmuls' results."""
    end = 0

    def site(num_experts: int, in_features: int, *widths: int, rank: int = rank) -> LoraSite:
        nonlocal end
        tables = torch.empty(2, len(widths), num_slots, dtype=torch.int64)
        for segment, width in enumerate(widths):
            for slot in range(num_slots):
                for table, columns in zip(tables, (in_features, width), strict=True):
                    table[segment, slot] = end
                    end += -(-num_experts * rank * columns // 128) * 128
        a, b = tables.to(device)
        ranks = torch.full(a.shape, rank, dtype=torch.int32, device=device)
        scale = torch.full(a.shape, 0.1 / (in_features * max(rank, 1)) ** 0.5, device=device)
        return LoraSite(in_features, widths, num_experts, a, b, ranks, scale)

    layer = LoraLayer(
        qkv=site(1, HIDDEN, *QKV_WIDTHS),
        output=site(1, QKV_WIDTHS[0], HIDDEN),
        router=site(1, HIDDEN, NUM_EXPERTS, rank=0),
        gate_up=site(NUM_EXPERTS, HIDDEN, 2 * INTER),
        down=site(NUM_EXPERTS, INTER, HIDDEN),
    )
    return Adapters(layer, torch.randn(end, device=device).bfloat16())


def exact_delta(
    x: Tensor,  # [num_rows, in_features] float64
    site: LoraSite,
    segment: int,
    memory: Tensor,
    slot_of_row: Tensor,
    expert: int = 0,
) -> Tensor:
    """scale (x A^T) B of each row's adapter, [num_rows, width] float64."""
    width = site.widths[segment]
    out = x.new_zeros(len(x), width)
    for slot in slot_of_row[slot_of_row >= 0].unique().tolist():
        rank, rows = int(site.rank[segment, slot]), slot_of_row == slot
        a, b = (
            memory[int(table[segment, slot]) + expert * rank * columns :][: rank * columns]
            .view(rank, columns)
            .double()
            for table, columns in ((site.a, site.in_features), (site.b, width))
        )
        out[rows] = x[rows] @ a.T * site.scale[segment, slot].double() @ b
    return out


def _cases_of(lora: LoraCase, num_adapters: int, rank: int) -> Iterator[Case]:
    step, num_tokens = lora.step, len(lora.step.inputs[0])
    case = partial(Case, labels={"adapters": num_adapters, "rank": rank}, num_tokens=num_tokens)
    used = lora.rows.slot_of_row.ge(0)
    ids = step.route(0).routing.expert_ids
    slots = lora.rows.slot_of_row[:, None].expand_as(ids)
    pairs = torch.stack((ids, slots), -1)[used].flatten(0, 1).unique(dim=0)
    per_pair = rank * (HIDDEN + 2 * INTER + INTER + HIDDEN)  # values of A and B
    yield case(
        "moe_layer_lora",
        run=lora.experts,
        check=lora.check_experts,
        num_bytes=step.experts_hit() * BYTES_PER_EXPERT + 2 * len(pairs) * per_pair,
        num_flops=TOP_K * 2 * (num_tokens * 3 * INTER * HIDDEN + int(used.sum()) * per_pair),
    )
    num_used = int(lora.rows.slot_of_row[used].unique().numel())
    for name, in_features, widths in (
        ("qkv", HIDDEN, QKV_WIDTHS),
        ("output", QKV_WIDTHS[0], (HIDDEN,)),
    ):
        xs, ys = (
            [torch.randn(num_tokens, n, device=used.device).bfloat16() for _ in range(NUM_INPUTS)]
            for n in (in_features, sum(widths))
        )
        values = rank * (len(widths) * in_features + sum(widths))
        yield case(
            f"lora_{name}",
            run=partial(lora.dense, name, xs, ys),
            check=partial(lora.check_dense, name, xs, ys),
            num_bytes=2 * num_used * values
            + 2 * int(used.sum()) * (in_features + 2 * sum(widths)),  # x; y there and back
            num_flops=2 * int(used.sum()) * values,
            num_calls=64,
        )
