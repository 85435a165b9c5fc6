"""Adapters on the GPU: the bundled model's two, their bits, and few slots."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import LoadAdapter, UnloadAdapter
from headrace.files import BUNDLED_MODEL
from headrace.models import load_model
from tests.engine.toy_model import run, tokens_of
from tests.lora.adapted import AdaptedModel, read
from tests.lora.random_adapters import random_adapter
from tests.lora.test_engine_adapters import ask, change, check_idle, news
from tests.paged import PagedSequences, logits_of

ADAPTERS = BUNDLED_MODEL.parent / "adapters"
PROMPT = torch.randint(0, 2000, (70,), generator=torch.Generator().manual_seed(1)).tolist()

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled adapters, and random ones of many ranks; one changes all that can be changed."""
    made = tmp_path_factory.mktemp("adapters")
    found = {name: ADAPTERS / name for name in ("subtract", "reverse")}
    for rank in (1, 5, 16, 33, 64):
        everything = rank == 16
        found[f"rank{rank}"] = random_adapter(
            made / f"rank{rank}", BUNDLED_MODEL, rank, rank=rank, everything=everything
        )
    return found


def make_engine(modules: dict[str, Path], **config: Any) -> Engine:
    named = tuple(f"{name}={path}" for name, path in modules.items())
    fields: dict[str, Any] = {
        **{"model": BUNDLED_MODEL, "device": "cuda", "kv_cache_memory": 64 << 20},
        **{"enable_lora": bool(modules), "lora_modules": named, "enable_prefix_caching": False},
        **{"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_loras": 8},
    }
    return Engine(EngineConfig(**fields | config))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["subtract", "rank1", "rank5", "rank16", "rank64"])
def test_logits_are_near_float32(paths: dict[str, Path], name: str) -> None:
    """On the CPU bfloat16 was 0.09 of the logits' spread off, and a random adapter in full 0.7."""
    exact, rounded = load_model(BUNDLED_MODEL), load_model(BUNDLED_MODEL, "cuda")
    adapter = read(exact, paths[name])
    if name.startswith("rank"):
        factors = {key: replace(f, scale=0.3 * f.scale) for key, f in adapter.factors.items()}
        adapter = replace(adapter, factors=factors)
    found = []
    for model in (exact, rounded):
        adapted = AdaptedModel(model, adapter)
        adapted.slot_of_seq = [0]
        found.append(logits_of(adapted, PROMPT).cpu())
    expected, got = found
    assert (got - expected).square().mean().sqrt() < 0.25 * expected.std()
    base = logits_of(exact, PROMPT)
    assert (base - expected).square().mean().sqrt() > 0.6 * expected.std()


@torch.inference_mode()
def test_a_row_has_the_same_bits_beside_any_other_adapter(paths: dict[str, Path]) -> None:
    exact, model = load_model(BUNDLED_MODEL), load_model(BUNDLED_MODEL, "cuda")
    names = ["rank1", "rank16", "rank33", "subtract"]
    adapted = AdaptedModel(model, *(read(exact, paths[name]) for name in names))
    alone = []
    for slot in range(-1, 4):
        adapted.slot_of_seq = [slot]
        alone.append(logits_of(adapted, PROMPT).clone())
    assert torch.equal(alone[0], logits_of(model, PROMPT))
    adapted.slot_of_seq = [2, -1, 0, 3, -1, 1, 1]
    together = PagedSequences(adapted, 7).step(dict.fromkeys(range(7), PROMPT))
    for logits, slot in zip(together.split(len(PROMPT)), adapted.slot_of_seq, strict=True):
        assert torch.equal(logits, alone[slot + 1]), slot


def test_base_rows_keep_their_bits_in_the_engine(paths: dict[str, Path]) -> None:
    """Through the graphs too: with and without --enable-lora, alone and beside adapters."""
    base = ask("base", PROMPT, None, logprobs=3, max_tokens=24)
    expected = news(run(make_engine({}), base)["base"])
    engine = make_engine(paths)
    assert news(run(engine, base)["base"]) == expected
    others = [ask(name, PROMPT[: 9 + i], name, max_tokens=24) for i, name in enumerate(paths)]
    together = run(engine, *others[:3], base, *others[3:])
    assert news(together["base"]) == expected
    for other in others:
        alone = run(engine, other)[other.request_id]
        assert tokens_of(alone) == tokens_of(together[other.request_id]), other.request_id


def test_seven_adapters_over_two_slots(paths: dict[str, Path]) -> None:
    large = make_engine(paths)
    prompts = PROMPT[:20], PROMPT[20:60]
    expected = {
        (name, i): tokens_of(run(large, ask("x", prompt, name, max_tokens=8))["x"])
        for name in [*paths, None]
        for i, prompt in enumerate(prompts)
    }
    assert len({tuple(t) for t in expected.values()}) > len(expected) // 2
    engine = make_engine(paths, max_loras=2, max_cpu_loras=4)
    keys = [list(expected)[i % len(expected)] for i in range(160)]
    requests = [ask(f"r{i}", prompts[p], n, max_tokens=8) for i, (n, p) in enumerate(keys)]
    outputs = run(engine, *requests)
    for i, key in enumerate(keys):
        assert tokens_of(outputs[f"r{i}"]) == expected[key], (i, key)
    check_idle(engine)


def test_load_and_unload_give_all_memory_back(paths: dict[str, Path]) -> None:
    engine = make_engine({"subtract": paths["subtract"]})
    run(engine, ask("1", PROMPT, "subtract"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        assert change(engine, LoadAdapter("more", str(paths["rank64"]))).error is None
        assert tokens_of(run(engine, ask("2", PROMPT, "more"))["2"])
        assert change(engine, UnloadAdapter("more")).error is None
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    check_idle(engine)


def test_steps_go_on_while_an_adapter_is_loaded(paths: dict[str, Path]) -> None:
    """The load's report comes while a request that began before it still gets its tokens."""
    engine = make_engine({"subtract": paths["subtract"]})
    engine.add_request(ask("long", PROMPT, "subtract", max_tokens=3900))
    engine.adapters.handle(LoadAdapter("more", str(paths["rank64"])))
    deadline, count = time.monotonic() + 60, 0
    while not (replies := engine.adapters.take_replies()):
        count += sum(len(output.token_ids) for output in engine.step())
        assert time.monotonic() < deadline
    assert replies[0].error is None
    assert 0 < count < 3900
    engine.abort(["long"])
