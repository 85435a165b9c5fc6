"""Paged attention's kernel against float64: real sizes on a GPU, small ones interpreted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops import attention_kernel
from headrace.ops import attention_plan as ap
from headrace.ops.attention import paged_attention
from headrace.ops.attention_plan import AttentionPlan, AttentionTile
from headrace.ops.linear import linear
from headrace.ops.rope import rope_and_cache, rope_cos_sin
from tests.ops.test_attention import Case, Inputs, exact, make

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")

SPLIT = {"split_above": 0.0}  # all that can be split is
WHOLE = {"split_above": math.inf}
ROW_OF_EACH = tuple((length, 1) for length in (1600, 260, 128, 129, 9, 1))
CASES = {
    "one decode row": Case(((9, 1),), head_dim=16),
    "a row of each": Case(ROW_OF_EACH, 8, 2, 16),
    "a row of each, window": Case(ROW_OF_EACH, 8, 2, 16, window=100),
    "a row of each, 20 heads on one": Case(((140, 1), (9, 1)), 20, 1, 16),
    "mixed": Case(((9, 1), (16, 16), (133, 5), (4, 1)), head_dim=16),
    "mixed, window": Case(((9, 1), (16, 16), (133, 5), (4, 1)), head_dim=16, window=5),
    "two tiles": Case(((300, 11),), 8, 1, 16, block_size=8),
    "two tiles, window": Case(((300, 40),), head_dim=16, block_size=8, window=20),
    "window of three blocks": Case(((300, 3), (129, 1)), head_dim=16, window=128, block_size=16),
    "window of one token": Case(((7, 7), (130, 1)), head_dim=16, window=1),
    "five heads on one": Case(((140, 14),), num_heads=5, num_kv_heads=1, head_dim=16),
    "as many kv heads": Case(((140, 66),), num_heads=3, num_kv_heads=3, head_dim=32, window=7),
    "page of a whole block": Case(((300, 3),), head_dim=16, block_size=256),
    "splits of both sizes": Case(((1600, 2), (1024, 1)), 2, 1, 16, block_size=64),
    "real head sizes": Case(((140, 3),), 64, 8, 64, 128, 16),
}


def plan_of(
    case: Case, split_above: float = 0.0, tile: AttentionTile = AttentionTile()
) -> AttentionPlan:
    lengths, rows = np.array(case.sequences).T
    heads = case.num_heads, case.num_kv_heads, case.head_dim
    sizes = {"num_sms": 2, "max_part_rows": 512, "tile": tile}
    shape = ap.plan_shape(int(rows.sum()), len(rows), *heads, **sizes)
    plan = ap.empty_plan(replace(shape, split_above=split_above), case.window, "cpu")
    return plan.fill(rows, lengths)


def interpret(case: Case, x: Inputs, single_rows: bool = True, **options) -> Tensor:
    """With single_rows=False, single rows are computed as those of a prompt are."""
    plan = plan_of(case, **options)
    plan = replace(plan, single_rows=plan.single_rows and single_rows)
    q = torch.cat(x.q)
    out = torch.full_like(q, torch.nan)
    scale = case.head_dim**-0.5
    attention_kernel.paged_attention(q, x.cache, x.block_table, x.sinks, scale, plan, out)
    assert not plan.words[plan.shape.counters_start :].any()
    return out


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_float64_and_parts_change_no_bit(name: str) -> None:
    case = CASES[name]
    x = make(case)
    whole = interpret(case, x, **WHOLE)
    assert_close(whole.double(), exact(case, x), rtol=1e-4, atol=1e-5)
    long = any(length > 128 for length, _ in case.sequences) and not case.window
    words = plan_of(case, **SPLIT).words
    assert bool((words[ap.HEADER + ap.PARTS :: len(ap.FIELDS)] > 1).any()) == long
    assert torch.equal(interpret(case, x, **SPLIT), whole)


@interpreted
@pytest.mark.parametrize("name", ["two tiles", "splits of both sizes"])
def test_interpreted_blocks_as_long_as_a_split(name: str) -> None:
    case, tile = CASES[name], AttentionTile(keys=128)
    x = make(case)
    whole = interpret(case, x, **WHOLE, tile=tile)
    assert_close(whole.double(), exact(case, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(interpret(case, x, **SPLIT, tile=tile), whole)


@interpreted
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(("chunk", "options"), [(1, SPLIT), (20, WHOLE)])
def test_interpreted_chunks_change_no_bit(window: int, chunk: int, options: dict) -> None:
    """Rows 254:258, on both sides of a cut: alone and split, or the last of 20, or amid 40.

    All with tall rows: numpy's products, unlike a GPU's, depend on which side is tall.
    """
    case = Case(((260, 40),), head_dim=16, window=window, block_size=16)
    x = make(case)
    expected = interpret(case, x, **WHOLE)[34:38]
    for row, end in enumerate(range(255, 259)):
        rows = replace(x, q=[x.q[0][end - chunk - 220 : end - 220]])
        part = replace(case, sequences=((end, chunk),))
        got = interpret(part, rows, single_rows=False, **options)
        assert torch.equal(got[-1], expected[row]), end


@interpreted
def test_interpreted_float16() -> None:
    case = CASES["two tiles, window"]
    x = make(case)
    x = replace(x, q=[q.half() for q in x.q], cache=x.cache.half())
    error = interpret(case, x).double() - exact(case, x)
    assert error.abs().max() < 0.01
    assert interpret(case, x).dtype == torch.float16


@interpreted
@pytest.mark.parametrize("wrong", ["sink", "window", "pages", "heads", "part", "position"])
def test_interpreted_wrong_attention_is_noticed(wrong: str) -> None:
    case = Case(((300, 2),), head_dim=16)
    x = make(case)
    plan = plan_of(case, **SPLIT)
    items = plan.words[ap.HEADER :].view(-1)
    if wrong == "sink":
        x = replace(x, sinks=x.sinks + 1)
    elif wrong == "window":
        plan = plan_of(replace(case, window=299))
    elif wrong == "pages":
        x.block_table[0, :75] = x.block_table[0, :75].roll(1)
    elif wrong == "heads":
        x = replace(x, q=[x.q[0].roll(1, 1)])
    elif wrong == "part":  # the last part is that of the second split again
        items[2 * len(ap.FIELDS) + ap.FIRST_BLOCK] -= 1
    else:
        items[ap.POSITION : 3 * len(ap.FIELDS) : len(ap.FIELDS)] -= 1
    q = torch.cat(x.q)
    out = torch.full_like(q, torch.nan)
    attention_kernel.paged_attention(q, x.cache, x.block_table, x.sinks, 0.25, plan, out)
    out = out.roll(-1, 1) if wrong == "heads" else out
    with pytest.raises(AssertionError):
        assert_close(out.double(), exact(case, make(case)), rtol=1e-4, atol=1e-5)


@interpreted
def test_an_empty_plan_computes_nothing() -> None:
    case = replace(CASES["mixed"], sequences=((9, 0),))
    x = make(replace(case, sequences=((9, 1),)))
    assert torch.equal(
        interpret(case, replace(x, q=[x.q[0][:0]])), torch.empty(0, case.num_heads, case.head_dim)
    )


@interpreted
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t[:, :2], r"q has shape \(1, 2, 16\)"),
        ("q", lambda t: t.repeat_interleave(2, -1)[..., ::2], r"strides \(128, 32, 2\)"),
        ("out", lambda t: t.half(), "out is torch.float16"),
        ("kv_cache", lambda t: t.transpose(2, 3), r"kv_cache has shape"),
        ("kv_cache", lambda t: t.half(), "kv_cache is torch.float16"),
        ("kv_cache", lambda t: t[:, :, :3].contiguous(), "block_size is 3"),
        ("block_table", lambda t: t.long(), "block_table is torch.int64"),
        ("sinks", lambda t: t[1:], r"sinks have shape \(3,\)"),
        ("scale", lambda t: -t, r"scale is -0.25"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(name, change, message) -> None:
    case = CASES["one decode row"]
    x = make(case)
    arguments = {
        "q": torch.cat(x.q), "kv_cache": x.cache, "block_table": x.block_table, "sinks": x.sinks,
        "scale": 0.25, "plan": plan_of(case), "out": torch.empty_like(x.q[0]),
    }  # fmt: skip
    attention_kernel.paged_attention(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        attention_kernel.paged_attention(**arguments)


NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE = 64, 8, 64, 16


@dataclass(frozen=True)
class Layer:
    """Keys and values of several sequences on scrambled pages, in bfloat16 on the GPU."""

    cache: Tensor
    block_table: Tensor
    sinks: Tensor
    lengths: Sequence[int]

    @classmethod
    def random(cls, lengths: Sequence[int], page: int = PAGE) -> Layer:
        """Slots past a sequence's end and pages of nobody hold NaN."""
        blocks = [math.ceil(n / page) for n in lengths]
        pages = torch.randperm(sum(blocks) + 3).int().cuda()
        cache = torch.randn(2, len(pages), page, NUM_KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
        table = torch.full((len(blocks), max(blocks)), -1, dtype=torch.int32, device="cuda")
        for seq, mine in enumerate(pages[: sum(blocks)].split(blocks)):
            table[seq, : len(mine)] = mine
            cache[:, mine[-1], (lengths[seq] - 1) % page + 1 :] = torch.nan
        cache[:, pages[sum(blocks) :]] = torch.nan
        sinks = torch.randn(NUM_HEADS, device="cuda").bfloat16()
        return cls(cache, table, sinks, lengths)

    def plan(self, window: int, **options) -> AttentionPlan:
        heads = NUM_HEADS, NUM_KV_HEADS, HEAD_DIM
        shape = ap.plan_shape(4096, max(len(self.lengths), 2), *heads, **options)
        return ap.empty_plan(shape, window, "cuda")

    def run(self, q, rows, ends, plan, seqs=slice(None)) -> Tensor:
        """The last rows[i] rows of the first ends[i] tokens of each sequence."""
        plan = plan.fill(np.array(rows), np.array(ends))
        starts = torch.tensor([0, *rows]).cumsum(0).int()
        return paged_attention(
            q, self.cache, self.block_table[seqs], starts, torch.tensor(ends).int(), self.sinks,
            plan.window, HEAD_DIM**-0.5, plan, torch.full_like(q, torch.nan),
        )  # fmt: skip

    def exact(self, q: Tensor, seq: int, end: int, window: int) -> Tensor:
        """One sequence in float64, KV head by KV head."""
        page = self.cache.shape[2]
        pages = self.block_table[seq, : math.ceil(end / page)].clamp(min=0)
        position = torch.arange(end - len(q), end, device="cuda").unsqueeze(1)
        key = torch.arange(end, device="cuda")
        seen = (key <= position) & (key > position - (window or end))
        out = torch.empty_like(q, dtype=torch.float64).unflatten(1, (NUM_KV_HEADS, -1))
        for head, sinks in enumerate(self.sinks.double().view(NUM_KV_HEADS, -1)):
            k, v = self.cache[:, :, :, head][:, pages].flatten(1, 2)[:, :end].double()
            k, v = (torch.where(seen.any(0).unsqueeze(1), t, 0.0) for t in (k, v))
            grouped = q.double().unflatten(1, (NUM_KV_HEADS, -1))[:, head]
            scores = (grouped @ k.T * HEAD_DIM**-0.5).masked_fill(~seen.unsqueeze(1), -torch.inf)
            sink = sinks.view(1, -1, 1).expand(len(q), -1, 1)
            out[:, head] = torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ v
        return out.flatten(1, 2)


def queries(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16() * 2


def check_close(out: Tensor, expected: Tensor) -> None:
    """Probabilities and the result are rounded to bfloat16."""
    error = out.double() - expected
    assert error.pow(2).mean().sqrt() < 0.005 * expected.pow(2).mean().sqrt()
    assert error.abs().max() < 0.02 * expected.abs().max()


@gpu
@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("page", [8, 16, 64])
def test_real_sizes_against_float64(window: int, page: int) -> None:
    lengths = [1, 5, 127, 128, 129, 640, 1025, 3000, 700, 2048]
    rows = [1, 5, 127, 1, 129, 1, 1, 9, 512, 64]
    layer = Layer.random(lengths, page)
    q = queries(sum(rows))
    if window:
        for seq, (length, count) in enumerate(zip(lengths, rows, strict=True)):
            layer.block_table[seq, : max(0, length - count - window + 1) // page] = -1
    out = layer.run(q, rows, lengths, layer.plan(window))
    for seq, (part, mine) in enumerate(zip(q.split(rows), out.split(rows), strict=True)):
        expected = layer.exact(part, seq, lengths[seq], window)
        check_close(mine, expected)
        with pytest.raises(AssertionError):
            check_close(mine.roll(1, 1), expected)
        with pytest.raises(AssertionError):
            check_close(torch.zeros_like(mine), expected)


@gpu
@pytest.mark.parametrize("window", [0, 128])
def test_chunks_change_no_bit(window: int) -> None:
    layer = Layer.random([1500])
    q = queries(1500)
    plan = layer.plan(window)
    expected = layer.run(q, [1500], [1500], plan)
    for chunk in (1, 7, 16, 128, 129, 512):
        for end in range(900, 1500, chunk):
            got = layer.run(q[end - chunk : end], [chunk], [end], plan)
            assert torch.equal(got, expected[end - chunk : end]), (chunk, end)


@gpu
@pytest.mark.parametrize("window", [0, 128])
def test_a_decode_row_has_the_bits_of_a_prompt_and_of_a_mixed_step(window: int) -> None:
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, 192, 560, 1023, 1024, 1025, 1600]
    layer = Layer.random(lengths)
    prompts = queries(sum(lengths)).split(lengths)
    expected = torch.stack([
        layer.run(q, [n], [n], layer.plan(window), slice(seq, seq + 1))[-1]
        for seq, (q, n) in enumerate(zip(prompts, lengths, strict=True))
    ])  # fmt: skip
    last = torch.stack([q[-1] for q in prompts])
    plan = layer.plan(window)
    assert plan.fill(np.ones(14, int), np.array(lengths)).single_rows
    assert torch.equal(layer.run(last, [1] * 14, lengths, plan), expected)
    rows = [1] * 13 + [40]
    mixed = layer.run(torch.cat((last[:13], prompts[13][-40:])), rows, lengths, plan)
    assert torch.equal(mixed[:13], expected[:13])
    assert torch.equal(mixed[-1], expected[-1])


@gpu
@pytest.mark.parametrize("window", [0, 128])
def test_companions_and_parts_change_no_bit(window: int) -> None:
    torch.manual_seed(1)
    lengths = [9000, 600, 1, 128, 2049, *torch.randint(1, 3000, (59,)).tolist()]
    layer = Layer.random(lengths)
    q = queries(64)
    together = layer.run(q, [1] * 64, lengths, layer.plan(window))
    never_split = layer.run(q, [1] * 64, lengths, layer.plan(window, max_part_rows=0))
    assert torch.equal(together, never_split)
    plan = layer.plan(window)
    for seq in range(64):
        alone = layer.run(q[seq : seq + 1], [1], lengths[seq : seq + 1], plan, slice(seq, seq + 1))
        assert torch.equal(alone[0], together[seq]), seq
    check_close(together[:1], layer.exact(q[:1], 0, 9000, window))


@gpu
@pytest.mark.parametrize(
    "tile",
    [
        AttentionTile(num_stages=3),
        AttentionTile(programs_per_sm=3),
        AttentionTile(rows=128, num_warps=8, programs_per_sm=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 128])
def test_tiles_of_as_many_keys_change_no_bit(tile: AttentionTile, window: int) -> None:
    lengths, rows = [1500, 1300, 70], [300, 1, 70]
    layer = Layer.random(lengths)
    q = queries(sum(rows))
    expected = layer.run(q, rows, lengths, layer.plan(window))
    assert torch.equal(layer.run(q, rows, lengths, layer.plan(window, tile=tile)), expected)


@gpu
@pytest.mark.parametrize("window", [0, 128])
def test_a_cuda_graph_serves_every_length_and_allocates_nothing(window: int) -> None:
    lengths = [5000, 700, 64, 2000]
    layer = Layer.random(lengths)
    q, plan = queries(4), layer.plan(window)
    out = torch.empty_like(q)

    def step() -> None:
        paged_attention(
            q, layer.cache, layer.block_table, None, None, layer.sinks, window, HEAD_DIM**-0.5,
            plan, out,
        )  # fmt: skip

    plan = plan.fill(np.ones(4, int), np.full(4, 64))
    step()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for ends in ([1, 1, 1, 1], lengths, [129, 700, 2, 1999]):
        expected = layer.run(q, [1] * 4, ends, layer.plan(window))
        out.fill_(torch.nan)
        plan.fill(np.ones(4, int), np.array(ends))
        graph.replay()
        assert torch.equal(out, expected), ends
        assert not plan.words[plan.shape.counters_start :].any()


@gpu
@pytest.mark.parametrize("window", [0, 128])
def test_131072_tokens(window: int) -> None:
    """One decode row, split, against float64 and against the last row of a chunk of 40."""
    length = 131072
    layer = Layer.random([length])
    q, plan = queries(40), layer.plan(window)
    decoded = layer.run(q[-1:], [1], [length], plan)
    chunk = layer.run(q, [40], [length], layer.plan(window, max_part_rows=0))
    assert torch.equal(decoded[0], chunk[-1])
    check_close(chunk[-3:], layer.exact(q[-3:], 0, length, window))


@gpu
@pytest.mark.parametrize("window", [0, 128])
def test_kernels_launched_early_wait_for_what_they_read(window: int) -> None:
    """Linear, RoPE and attention, eight times in a row: as a graph, and one kernel at a time."""
    lengths, num_layers, hidden = [1000, 30, 129], 8, NUM_HEADS * HEAD_DIM
    layers = [Layer.random(lengths) for _ in range(num_layers)]
    before = [layer.cache.clone() for layer in layers]
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    weights = [torch.randn(heads * HEAD_DIM, hidden, device="cuda").bfloat16() / 64 for _ in layers]
    last = torch.tensor(lengths, device="cuda") - 1
    rope = rope_cos_sin(last, torch.rand(HEAD_DIM // 2, device="cuda"), 1.0)
    rows = torch.arange(3, device="cuda")
    slots = [t.block_table[rows, last // PAGE] * PAGE + last % PAGE for t in layers]
    plan = layers[0].plan(window)
    plan = plan.fill(np.ones(3, int), np.array(lengths))
    qkv = torch.empty(3, heads * HEAD_DIM, device="cuda").bfloat16()
    first, q, out = queries(3), queries(3), [queries(3) for _ in layers]

    def step(between) -> None:
        x = first
        for layer, weight, places, attended in zip(layers, weights, slots, out, strict=True):
            linear(x.flatten(1), weight, out=qkv)
            between()
            rope_and_cache(qkv, *rope, layer.cache, places, NUM_HEADS, NUM_KV_HEADS, q)
            between()
            paged_attention(
                q, layer.cache, layer.block_table, None, None, layer.sinks, window,
                HEAD_DIM**-0.5, plan, attended,
            )  # fmt: skip
            between()
            x = attended

    step(torch.cuda.synchronize)
    expected = [t.clone() for t in out]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(lambda: None)
    for _ in range(3):
        for layer, cache, attended in zip(layers, before, out, strict=True):
            layer.cache.copy_(cache)
            attended.fill_(torch.nan)
        q.fill_(torch.nan)
        qkv.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@gpu
def test_cuda_tensors_need_a_plan_of_their_window() -> None:
    layer = Layer.random([5])
    arguments = (layer.cache, layer.block_table, None, None, layer.sinks, 0, 1.0)
    with pytest.raises(ValueError, match="plan is None; CUDA tensors need one made for window 0"):
        paged_attention(queries(1), *arguments)
    with pytest.raises(ValueError, match="plan is made for window 128"):
        paged_attention(queries(1), *arguments, layer.plan(128))
