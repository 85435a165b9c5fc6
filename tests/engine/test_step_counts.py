"""What a step of gpt-oss-20b launches, allocates and waits for, counted without a GPU or a clock.

The model has its real sizes, but no memory: its tensors are on torch's meta device, a launch of a
Triton kernel is noted and not run, and reading a value back to the host raises. Whoever changes a
number below changes what every token costs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from headrace.bench.floors import Step, step_work, total
from headrace.bench.synth import SIZES
from headrace.lora.memory import LoraMemory
from headrace.lora.targets import model_sites
from headrace.models.batch import Batch, KVGroup
from headrace.models.config import GptOssConfig, parse_config
from headrace.models.gpt_oss import GptOss, GptOssWeights, LayerWeights
from headrace.ops import dispatch, sampling
from headrace.ops.attention_plan import empty_plan, plan_shape
from headrace.ops.experts import Experts
from headrace.ops.lora import LoraBatch, LoraRows
from headrace.ops.moe import MoEWeights
from headrace.ops.mxfp4_kernel import PreparedMXFP4, RowOrder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is launched here")

# Launches of one layer; those of a step beside them: before the layers, and after.
LAYER = {
    "linear_kernel": 2,  # q, k, v; output
    "rope_and_cache_kernel": 1,
    "attention_kernel": 1,
    "router_kernel": 1,
    "grouped_matmul_kernel": 2,
    "weighted_sum_kernel": 1,  # and the norm of the next layer
}
MANY = 129  # tokens: from here on the router's norm and the end of its sort are on their own
MANY_LAYER = LAYER | {"norm_kernel": 1, "place_kernel": 1}
STEP = {
    "embed_kernel": 1,
    "cos_sin_kernel": 1,
    "rms_norm_kernel": 2,  # before the first layer; of the rows that have logits
    "linear_kernel": 1,  # LM head
}
# What adapters add, however many: beside q, k, v and the output x A^T is a launch of its own, and
# so is its product with B; the router's and the experts' launches compute both.
LORA_LAYER = {"shrink_kernel": 2, "expand_kernel": 2}
MOST = 257  # tokens: from here on x A^T of the experts is a launch of its own, too
MOST_LORA_LAYER = {"shrink_kernel": 4, "expand_kernel": 2}
LORA_STEP = {
    "embedding_shrink_kernel": 1,
    "shrink_kernel": 1,  # LM head
    "expand_kernel": 2,
}
GREEDY = {"best_kernel": 1, "argmax_kernel": 1}
DRAWN = GREEDY | {"masses_kernel": 1, "draw_kernel": 1}
FILTERED = DRAWN | {"levels_kernel": 2, "candidates_kernel": 1, "search_kernel": 1}
SAMPLE = {"greedy": GREEDY, "drawn": DRAWN, "top_k and top_p": FILTERED}
# Bytes that a decode step must move at 512 tokens of context, by headrace.bench.floors.
STEP_GB = {1: 3.72, 16: 11.64, 128: 14.61}
BATCHES = (1, 2, 16, 64, 128)
RANK = 64


class Counts(TorchDispatchMode):
    """What happens while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []  # of kernels
        self.allocations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        name = func.name().partition(".")[0]
        if any(t.untyped_storage()._cdata not in given for t in tensors(result)):
            self.allocations.append(name)
        if not func.is_view and name not in ("aten::detach", "aten::empty"):
            self.launches[name] += 1
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts launches of kernels too, and lets none of them run."""
    counts = Counts()

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        counts.launches[self.__name__] += 1
        counts.calls.append((self.__name__, args, kwargs))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    return counts


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return empty(*shape, dtype=dtype)


def config_of(num_layers: int) -> GptOssConfig:
    kinds = ["sliding_attention", "full_attention"] * (num_layers // 2)
    return parse_config(SIZES["20b"] | {"num_hidden_layers": num_layers, "layer_types": kinds})


def make_model(config: GptOssConfig) -> GptOss:
    hidden, inter, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    q_width = config.num_attention_heads * config.head_dim
    qkv_width = q_width + 2 * config.num_key_value_heads * config.head_dim

    def mxfp4(rows: int, columns: int, order: RowOrder) -> PreparedMXFP4:
        tiles = experts, -(-rows // 64), -(-columns // 128)
        words, scales = ints(*tiles[:2], 2 * tiles[2], 512), ints(*tiles, 64)
        return PreparedMXFP4(words, scales, rows, columns, order, 0)

    layer = LayerWeights(
        attention_norm=empty(hidden),
        qkv=empty(qkv_width, hidden),
        qkv_bias=empty(qkv_width),
        output=empty(hidden, q_width),
        output_bias=empty(hidden),
        sinks=empty(config.num_attention_heads),
        moe=MoEWeights(
            norm=empty(hidden),
            eps=config.rms_norm_eps,
            router=empty(experts, hidden),
            router_bias=empty(experts),
            experts=Experts(
                gate_up=mxfp4(2 * inter, hidden, RowOrder.INTERLEAVED),
                gate_up_bias=empty(experts, 2 * inter),
                down=mxfp4(hidden, inter, RowOrder.PLAIN),
                down_bias=empty(experts, hidden),
            ),
            top_k=config.num_experts_per_tok,
        ),
    )
    vocabulary = config.vocab_size, hidden
    layers = (layer,) * config.num_hidden_layers
    return GptOss(
        config, GptOssWeights(empty(*vocabulary), layers, empty(hidden), empty(*vocabulary))
    )


def decode_batch(model: GptOss, num_seqs: int, block_size: int = 16) -> Batch:
    layout = model.kv_layout
    heads = layout.num_heads, layout.num_kv_heads, layout.head_dim
    shape = plan_shape(2048, MANY, *heads)
    page = 2, 64, block_size, layout.num_kv_heads, layout.head_dim
    longs = [ints(num_seqs, dtype=torch.int64) for _ in range(6)]
    return Batch(
        token_ids=longs[0],
        positions=longs[1],
        query_start=ints(num_seqs + 1),
        seq_lens=ints(num_seqs),
        groups=tuple(
            KVGroup(ints(num_seqs, 64), slots, window, empty_plan(shape, window, "meta"))
            for slots, window in zip(longs[2:4], layout.windows, strict=True)
        ),
        output_rows=longs[4],
        kv_cache=tuple(empty(*page) for _ in range(layout.num_layers)),
        sampled=longs[5],
    )


def adapters_of(model: GptOss, num_seqs: int) -> LoraBatch:
    slots = 2
    device = torch.device("meta")
    memory = LoraMemory(model_sites(model.config), slots, RANK, 1 << 30, model.dtype, device)
    rows = LoraRows(ints(num_seqs), ints(num_seqs), ints(slots), ints(slots + 1))
    return LoraBatch(memory.weights, rows, rows)


def run_step(counts: Counts, num_layers: int, num_seqs: int, lora: bool = False) -> Counter[str]:
    """The launches of one decode step, after a look at its allocations."""
    model = make_model(config_of(num_layers))
    model.reserve(2048, MANY, RANK if lora else 0)
    batch = decode_batch(model, num_seqs)
    if lora:
        batch = replace(batch, lora=adapters_of(model, num_seqs))
    counts.launches.clear()
    with torch.inference_mode(), counts:
        model.forward(batch)
    assert counts.allocations == []
    return Counter(counts.launches)


def expected(num_layers: int, layer: dict[str, int], step: dict[str, int]) -> Counter[str]:
    return Counter(step) + Counter({name: num_layers * n for name, n in layer.items()})


@pytest.mark.parametrize("num_seqs", BATCHES)
def test_a_decode_step(counts: Counts, num_seqs: int) -> None:
    assert run_step(counts, 4, num_seqs) == expected(4, LAYER, STEP)


def test_a_step_of_many_tokens(counts: Counts) -> None:
    assert run_step(counts, 4, MANY) == expected(4, MANY_LAYER, STEP)


@pytest.mark.parametrize("num_seqs", [*BATCHES, MANY, MOST - 1, MOST])
def test_a_decode_step_with_adapters(counts: Counts, num_seqs: int) -> None:
    launches = run_step(counts, 4, num_seqs, lora=True)
    launches.subtract(expected(4, MANY_LAYER if num_seqs >= MANY else LAYER, STEP))
    added = MOST_LORA_LAYER if num_seqs >= MOST else LORA_LAYER
    assert +launches == expected(4, added, LORA_STEP)
    assert -launches == Counter()


def test_a_shrink_that_does_not_wait_for_x_follows_the_linear_of_x(counts: Counts) -> None:
    run_step(counts, 4, 16, lora=True)
    beside = 0
    for (name, args, _), (_, next_args, next_options) in pairwise(counts.calls):
        if next_options.get("X_DONE"):
            beside += 1
            assert name == "linear_kernel"
            assert args[0] is next_args[0]
    assert beside == 4 * 2 + 1  # q, k, v and output of each layer, LM head


@pytest.mark.parametrize("kind", SAMPLE)
def test_sampling(counts: Counts, kind: str) -> None:
    num_seqs, vocab_size = 16, config_of(2).vocab_size
    buffers = sampling.sampling_buffers(
        lambda shape, dtype: empty(*shape, dtype=dtype), num_seqs, vocab_size
    )
    floats = [empty(num_seqs, dtype=torch.float32) for _ in range(3)]
    rows, out = (ints(num_seqs, dtype=torch.int64) for _ in range(2))
    num_filtered = num_seqs if kind == "top_k and top_p" else 0
    draws = sampling.Draws(rows, num_filtered, *floats, ints(num_seqs))
    uniform = empty(num_seqs, dtype=torch.float64)
    logits = empty(num_seqs, vocab_size, dtype=torch.float32)
    drawn = (None, None) if kind == "greedy" else (draws, uniform)
    with torch.inference_mode(), counts:
        sampling.sample(logits, *drawn, out, buffers)
    assert counts.allocations == []
    assert counts.launches == Counter(SAMPLE[kind])


@pytest.mark.parametrize("num_seqs", STEP_GB)
def test_bytes_of_a_step(num_seqs: int) -> None:
    work = total(step_work(config_of(24), Step(num_seqs, 1, 512)))
    assert work.bytes / 1e9 == pytest.approx(STEP_GB[num_seqs], abs=0.005)


def test_an_allocation_and_a_wait_would_show(counts: Counts) -> None:
    model = make_model(config_of(2))
    with torch.inference_mode(), counts:
        model.forward(decode_batch(model, 4))  # without reserve()
    assert "aten::empty" in counts.allocations
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        empty(1).item()
