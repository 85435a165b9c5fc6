"""The whole model against two independent implementations, in float32 on random checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.models import Model, load_model
from headrace.models.weights import write_checkpoint
from headrace.ops import dispatch
from tests.checkpoints import YARN, random_checkpoint, random_tensors, tiny_config
from tests.hollow import narrow_20b
from tests.models.half import in_half
from tests.oracles import openai_logits, transformers_logits
from tests.paged import PagedSequences, generate_greedily, logits_of

TOLERANCE = 1e-4  # the oracles agree with each other to about 5e-6; logits have a deviation of 2
PROMPT_LENGTH = 100  # beyond every window below and YaRN's original context of 64

CASES: dict[str, dict[str, Any]] = {
    "5 experts, top 2": {},
    "8 experts, top 1, window of 5": {
        **{"num_local_experts": 8, "num_experts_per_tok": 1, "sliding_window": 5},
    },
    "8 experts, all of them chosen": {"num_local_experts": 8, "num_experts_per_tok": 8},
    "32 experts, top 4, long and short side": {
        **{"num_local_experts": 32, "num_experts_per_tok": 4},
        **{"hidden_size": 96, "intermediate_size": 32},
    },
    "32 experts, top 8, one kv head": {
        **{"num_local_experts": 32, "num_experts_per_tok": 8},
        **{"num_attention_heads": 8, "num_key_value_heads": 1},
    },
    "dense, sizes that are no multiples of 32": {
        **{"experts": "dense", "hidden_size": 52, "intermediate_size": 44},
        **{"num_attention_heads": 6, "num_key_value_heads": 3},
    },
    "dense, 32 experts, heads without groups, window of 1": {
        **{"experts": "dense", "num_local_experts": 32, "num_experts_per_tok": 3},
        **{"num_attention_heads": 3, "num_key_value_heads": 3, "sliding_window": 1},
    },
    "gpt-oss's own YaRN, head_dim 32, 3 layers": {
        "head_dim": 32,
        "num_hidden_layers": 3,
        "rope_scaling": YARN
        | {"factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0},
    },
    "plain rope": {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
    "tied embeddings, window longer than the prompt": {
        **{"tie_word_embeddings": True, "sliding_window": 128},
    },
}
TRANSFORMERS_ONLY: dict[str, dict[str, Any]] = {
    "truncated YaRN": {"rope_scaling": YARN | {"truncate": True}},
    "no attention biases": {"attention_bias": False},
    "three windowed layers before a full one": {
        **{"num_hidden_layers": 4, "sliding_window": 7},
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
}


def prompt(seed: int = 0, length: int = PROMPT_LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def checkpoint(path: Path, name: str) -> Path:
    cases = CASES | TRANSFORMERS_ONLY
    return random_checkpoint(path, seed=list(cases).index(name), **cases[name])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", CASES | TRANSFORMERS_ONLY)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path, name)
    expected = transformers_logits(path, prompt())
    assert distance(logits_of(load_model(path), prompt()), expected) < TOLERANCE
    assert expected.std() > 0.5


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_openai(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gpt_oss.torch.model")
    path = checkpoint(tmp_path, name)
    expected = openai_logits(path, prompt())
    assert distance(logits_of(load_model(path), prompt()), expected) < TOLERANCE


def test_the_limit_of_swiglu_comes_from_the_config(tmp_path: Path) -> None:
    """transformers 5.17 fixes it at 7, OpenAI's reference reads it."""
    pytest.importorskip("gpt_oss.torch.model")
    path = random_checkpoint(tmp_path, seed=0, swiglu_limit=1.5)
    actual = logits_of(load_model(path), prompt())
    assert distance(actual, openai_logits(path, prompt())) < TOLERANCE
    assert distance(actual, transformers_logits(path, prompt())) > 0.1


@pytest.mark.parametrize("name", CASES | TRANSFORMERS_ONLY)
def test_greedy_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    """Each of our 64 tokens is transformers' choice after the same ones: so are all of them.

    One forward of transformers instead of 64; its cache is wrong for a window of 1 (5.17).
    """
    path = checkpoint(tmp_path, name)
    start = prompt(1, 40)
    tokens = generate_greedily(load_model(path), start, 64)
    choices = transformers_logits(path, start + tokens)[len(start) - 1 : -1].argmax(-1)
    assert tokens == choices.tolist()
    assert len(tokens) == 64
    assert len(set(tokens)) > 4


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunked_prefill_gives_the_same_logits(tmp_path: Path, chunk: int) -> None:
    model = load_model(random_checkpoint(tmp_path, seed=0))
    whole = logits_of(model, prompt())
    assert distance(logits_of(model, prompt(), chunk), whole) < TOLERANCE


def test_prompts_longer_than_the_rows_attended_at_once(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path, seed=0, max_position_embeddings=512)
    tokens = prompt(0, 300)
    assert (
        distance(logits_of(load_model(path), tokens), transformers_logits(path, tokens)) < TOLERANCE
    )


def test_sequences_in_one_batch_do_not_touch_each_other(tmp_path: Path) -> None:
    """Prefill chunks and decode rows mixed, with pages that windows have passed given back."""
    model = load_model(random_checkpoint(tmp_path, seed=0))
    texts = [prompt(seed, length) for seed, length in enumerate((40, 71, 55))]
    alone = [logits_of(model, text) for text in texts]
    sequences = PagedSequences(model, len(texts))
    done = [0, 0, 0]
    schedule = [(20, 0, 9), (1, 30, 1), (1, 30, 0), (0, 1, 40), (1, 5, 1), (17, 5, 4)]
    for step in schedule:
        rows = {s: texts[s][done[s] : done[s] + n] for s, n in enumerate(step) if n}
        logits = sequences.step(rows).split([len(r) for r in rows.values()])
        for (seq, tokens), part in zip(rows.items(), logits, strict=True):
            expected = alone[seq][done[seq] : done[seq] + len(tokens)]
            assert distance(part, expected) < TOLERANCE
            done[seq] += len(tokens)
    assert done == [len(text) for text in texts]
    assert min(sequences.tables[1][1]) == -1, "the window has passed no page"


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="measured with MKL only")
def test_decode_rows_are_bit_identical_in_any_company(tmp_path: Path) -> None:
    model = load_model(random_checkpoint(tmp_path, seed=0))
    texts = [prompt(seed, 30) for seed in range(3)]
    alone = [logits_of(model, text, chunk=1) for text in texts]
    sequences = PagedSequences(model, 3)
    for position in range(30):
        logits = sequences.step({s: [text[position]] for s, text in enumerate(texts)})
        for seq in range(3):
            assert torch.equal(logits[seq], alone[seq][position])


def test_only_the_wanted_rows_come_back(tmp_path: Path) -> None:
    model = load_model(random_checkpoint(tmp_path, seed=0))
    everything = logits_of(model, prompt())
    sequences = PagedSequences(model, 1)
    some = sequences.step({0: prompt()}, output_rows=[99, 3])
    assert distance(some, everything[[99, 3]]) < TOLERANCE


BROKEN = {
    "sinks": "self_attn.sinks",
    "query bias": "self_attn.q_proj.bias",
    "key weight": "self_attn.k_proj.weight",
    "value bias": "self_attn.v_proj.bias",
    "output bias": "self_attn.o_proj.bias",
    "router": "mlp.router.weight",
    "router bias": "mlp.router.bias",
    "gate and up": "mlp.experts.gate_up_proj",
    "gate and up bias": "mlp.experts.gate_up_proj_bias",
    "down": "mlp.experts.down_proj",
    "down bias": "mlp.experts.down_proj_bias",
}


@pytest.mark.parametrize("component", BROKEN)
def test_a_lost_component_would_show(tmp_path: Path, component: str) -> None:
    """The comparisons above have teeth: zeros in place of any component move the logits."""
    config = tiny_config()
    tensors = random_tensors(config, seed=0)
    write_checkpoint(tmp_path / "whole", config, tensors)
    name = f"model.layers.1.{BROKEN[component]}"
    broken = tensors | {name: torch.zeros_like(tensors[name])}
    write_checkpoint(tmp_path / "broken", config, broken)
    logits = [logits_of(load_model(tmp_path / d), prompt()) for d in ("whole", "broken")]
    assert distance(*logits) > 0.1


@pytest.mark.parametrize(
    "wrong", [{"sliding_window": 15}, {"rope_scaling": None}, {"rms_norm_eps": 0.1}]
)
def test_a_wrong_field_would_show(tmp_path: Path, wrong: dict[str, Any]) -> None:
    tensors = random_tensors(tiny_config(), seed=0)
    write_checkpoint(tmp_path / "right", tiny_config(), tensors)
    write_checkpoint(tmp_path / "wrong", tiny_config(**wrong), tensors)
    logits = [logits_of(load_model(tmp_path / d), prompt()) for d in ("right", "wrong")]
    assert distance(*logits) > 0.1


def test_bfloat16_with_packed_experts_is_near_float32(tmp_path: Path) -> None:
    """bf16 rounds each step by 2^-9; logits of deviation 2 stay within a few tenths."""
    path = random_checkpoint(tmp_path, seed=0)
    exact, rounded = (load_model(path, dtype=d) for d in ("float32", "bfloat16"))
    a, b = logits_of(exact, prompt()), logits_of(rounded, prompt())
    assert (a - b).square().mean().sqrt() < 0.1 * a.std()
    assert (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.9


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU only")
def test_the_kernels_forward_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kernels of a step in Triton's interpreter: a prompt in two chunks beside a decode row."""
    path = random_checkpoint(tmp_path, seed=0, num_local_experts=4)
    expected = run_mixed_steps(load_model(path, dtype="float32"))
    model = in_half(load_model(path, dtype="bfloat16"))
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    got = run_mixed_steps(model)
    assert (got - expected).square().mean().sqrt() < 0.02 * expected.std()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def run_mixed_steps(model: Model) -> Tensor:
    sequences = PagedSequences(model, 2, block_size=8)
    tokens = prompt()
    first = sequences.step({0: tokens[:13], 1: tokens[50:55]}, [12, 17]).clone()
    second = sequences.step({1: tokens[55:56], 0: tokens[13:41]}, [0, 28]).clone()
    return torch.cat([first, second])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_is_near_float32(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path, name)
    exact, rounded = (logits_of(load_model(path, d), prompt()).cpu() for d in ("cpu", "cuda"))
    # bfloat16 on the CPU is 0.01 to 0.08 off: a row whose experts are nearly tied takes others
    assert (exact - rounded).square().mean().sqrt() < 0.25 * exact.std()


@pytest.mark.parametrize("top_k", [3, 4])
def test_what_is_reserved_holds_fewer_rows(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """x A^T takes more memory for 256 rows of logits than for 258, for 341 tokens than for 342."""
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    model = narrow_20b()
    moe = replace(model.weights.layers[0].moe, top_k=top_k)
    layers = tuple(replace(layer, moe=moe) for layer in model.weights.layers)
    model.weights = replace(model.weights, layers=layers)
    model.reserve(345, 258, max_lora_rank=512)
    for num_tokens in (1, 170, 256, 257, 340, 341, 342, 345):
        for num_outputs in (1, 128, 255, 256, 257, 258):
            model._step_buffers(num_tokens, num_outputs)  # a MemoryError if there is no room
