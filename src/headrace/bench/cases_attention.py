"""Attention of gpt-oss: decode rows, whole prompts, chunks at the end of long prompts; RoPE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.bench.case import NUM_INPUTS, Case
from headrace.ops import dispatch
from headrace.ops.attention import paged_attention
from headrace.ops.attention_plan import AttentionPlan, empty_plan, plan_shape
from headrace.ops.rope import apply_rope, rope_and_cache

OPS = ("attention", "rope_and_cache")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE = 64, 8, 64, 16
WINDOW = 128
COLD_BYTES = 200e6  # of keys and values in turn: four times the L2 of an H100


@dataclass(frozen=True)
class Attention:
    """num_seqs sequences of `context` tokens, the last query_len of them in this step."""

    step: str  # decode, prompt or chunk
    num_seqs: int
    query_len: int
    context: int
    window: int  # 0 = all

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return self.num_seqs * self.query_len

    @property
    def keys_read(self) -> int:
        """Keys that some row sees."""
        unseen = self.context - self.query_len - self.window + 1 if self.window else 0
        return self.num_seqs * (self.context - max(0, unseen))

    @property
    def keys_scored(self) -> int:
        """Pairs of a row and a key that it sees."""
        seen = np.arange(self.context - self.query_len, self.context) + 1
        return self.num_seqs * int(np.minimum(seen, self.window or self.context).sum())


def problems(sizes: Sequence[int]) -> Iterator[Attention]:
    """Decode at three contexts, prompts of 512 tokens, chunks of 2048 of long prompts."""
    for window in (0, WINDOW):
        decode = [(n, 600) for n in sizes if n <= 128]
        if not window:
            decode += [(n, 8192) for n in sizes if n <= 128] + [(1, 131072)] * (1 in sizes)
        yield from (Attention("decode", n, 1, context, window) for n, context in decode)
        for num_tokens in sizes:
            if num_tokens % 512 == 0:
                yield Attention("prompt", num_tokens // 512, 512, 512, window)
            if num_tokens == 2048 and not window:
                yield from (Attention("chunk", 1, 2048, n, 0) for n in (32768, 131072))


@dataclass(frozen=True)
class Calls:
    """What the calls of one case read and write: call i takes input i % 8 and its own pages."""

    problem: Attention
    inputs: Sequence[Tensor]  # each [num_tokens, num_heads, head_dim]
    cache: Tensor  # [2 (k, v), num_pages, PAGE, num_kv_heads, head_dim]
    tables: Tensor  # [sets, num_seqs, blocks] int32
    query_start: Tensor  # [num_seqs + 1] int32
    seq_lens: Tensor  # [num_seqs] int32
    sinks: Tensor  # [num_heads]
    plan: AttentionPlan
    out: Tensor  # [num_tokens, num_heads, head_dim]

    def run(self, i: int) -> Tensor:
        """The public op."""
        return paged_attention(
            self.inputs[i % len(self.inputs)],
            self.cache,
            self.tables[i % len(self.tables)],
            self.query_start,
            self.seq_lens,
            self.sinks,
            self.problem.window,
            HEAD_DIM**-0.5,
            self.plan,
            self.out,
        )

    def check(self) -> None:
        """Every row is written, and the first and last rows are right."""
        self.out.fill_(float("nan"))
        self.check_result(self.run(0))

    def check_result(self, out: Tensor) -> None:
        """Those rows of call 0's result against float64."""
        assert not out.isnan().any(), "rows were not written"
        for row in {0, len(out) // 2, len(out) - 1}:
            expected = self._exact(row)
            error = (out[row].double() - expected).square().mean().sqrt()
            assert error < 0.01 * expected.square().mean().sqrt(), f"row {row} is off by {error}"

    def _exact(self, row: int) -> Tensor:
        """[num_heads, head_dim] float64."""
        problem = self.problem
        seq, token = divmod(row, problem.query_len)
        last = problem.context - problem.query_len + token
        first = max(0, last - problem.window + 1) if problem.window else 0
        keys = self.cache[:, self.tables[0, seq]].flatten(1, 2)[:, first : last + 1]
        q = self.inputs[0][row].double().view(NUM_KV_HEADS, -1, HEAD_DIM)
        out = torch.empty_like(q)
        for head, sinks in enumerate(self.sinks.double().view(NUM_KV_HEADS, -1, 1)):
            k, v = keys[:, :, head].double()
            scores = torch.cat((q[head] @ k.T * HEAD_DIM**-0.5, sinks), dim=1)
            out[head] = scores.softmax(1)[:, :-1] @ v
        return out.flatten(0, 1)


def cases(sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
    """The attention of every problem, then RoPE with the write to the cache."""
    for problem in problems(sizes):
        yield attention_case(random_calls(problem, device))
    for num_tokens in sizes:
        yield rope_case(num_tokens, device)


def attention_case(calls: Calls) -> Case:
    """Keys, values, queries and results once; 4 FLOPs a key, row and head's element."""
    problem = calls.problem
    key_bytes = 2 * NUM_KV_HEADS * HEAD_DIM * calls.cache.element_size()
    return Case(
        "attention",
        {"step": problem.step, "context": problem.context, "window": problem.window},
        problem.num_tokens,
        run=calls.run,
        check=calls.check,
        num_bytes=problem.keys_read * key_bytes + 2 * calls.out.nbytes,
        num_flops=4 * problem.keys_scored * NUM_HEADS * HEAD_DIM,
        num_calls=4 if problem.keys_scored > 1e7 else 24,
    )


def random_calls(problem: Attention, device: torch.device) -> Calls:
    """Random queries, keys and values, on scattered pages."""
    blocks = math.ceil(problem.context / PAGE)
    pages = problem.num_seqs * blocks
    page_bytes = 2 * PAGE * NUM_KV_HEADS * HEAD_DIM * 2
    sets = min(24, math.ceil(COLD_BYTES / (pages * page_bytes))) if device.type == "cuda" else 2
    table = torch.randperm(sets * pages, device=device).int()
    num_tokens = problem.num_tokens
    num_sms = dispatch.num_sms(table)
    shape = plan_shape(num_tokens, problem.num_seqs, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, num_sms)
    ones = np.ones(problem.num_seqs, np.int64)
    plan = empty_plan(shape, problem.window, device)
    plan = plan.fill(problem.query_len * ones, problem.context * ones)
    starts = torch.arange(problem.num_seqs + 1, dtype=torch.int32, device=device)
    return Calls(
        problem,
        [_normal(num_tokens, NUM_HEADS, HEAD_DIM, device=device) for _ in range(NUM_INPUTS)],
        _normal(2, sets * pages, PAGE, NUM_KV_HEADS, HEAD_DIM, device=device),
        table.view(sets, problem.num_seqs, blocks),
        starts * problem.query_len,
        torch.full_like(starts[1:], problem.context),
        _normal(NUM_HEADS, device=device),
        plan,
        torch.empty(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device),
    )


def rope_case(num_tokens: int, device: torch.device) -> Case:
    """qkv read once, written once in three places."""
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    inputs = [_normal(num_tokens, heads * HEAD_DIM, device=device) for _ in range(NUM_INPUTS)]
    angles = torch.rand(num_tokens, 1, HEAD_DIM // 2, device=device) * 6
    rope = angles.cos(), angles.sin()
    num_pages = math.ceil(num_tokens / PAGE)
    cache = _normal(2, num_pages, PAGE, NUM_KV_HEADS, HEAD_DIM, device=device)
    slots = torch.randperm(num_pages * PAGE, device=device)[:num_tokens]
    out = torch.empty(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)

    def run(i: int) -> Tensor:
        qkv = inputs[i % NUM_INPUTS]
        return rope_and_cache(qkv, *rope, cache, slots, NUM_HEADS, NUM_KV_HEADS, out)

    def check() -> None:
        cache.fill_(float("nan"))
        by_head = inputs[0].view(num_tokens, heads, HEAD_DIM)
        turned = apply_rope(by_head[:, :-NUM_KV_HEADS], *rope)
        q, k = turned.split((NUM_HEADS, NUM_KV_HEADS), dim=1)
        torch.testing.assert_close(run(0), q, rtol=0.01, atol=0.01)
        keys, values = cache.flatten(1, 2)[:, slots]
        torch.testing.assert_close(keys, k, rtol=0.01, atol=0.01)
        assert torch.equal(values, by_head[:, -NUM_KV_HEADS:]), "values must be copied as they are"

    num_bytes = 2 * inputs[0].nbytes + angles.nbytes * 2
    return Case("rope_and_cache", {}, num_tokens, run, check, num_bytes, 0.0, num_calls=64)


def _normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)
