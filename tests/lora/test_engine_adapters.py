"""Adapters through the engine: many over few slots, and what becomes of names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import (
    AdapterReply,
    AddRequest,
    LoadAdapter,
    RequestOutput,
    SamplingParams,
    UnloadAdapter,
)
from headrace.models import Model, load_model
from tests.checkpoints import random_checkpoint
from tests.lora.random_adapters import random_adapter

PROMPTS = ([5, 9, 200, 31, 7], [77, 3, 3, 120, 64, 18, 2])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    return random_checkpoint(path, seed=5, num_hidden_layers=1, num_local_experts=3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_model(checkpoint)


def adapter_paths(checkpoint: Path, directory: Path, count: int) -> dict[str, Path]:
    """Adapters of ranks 1 to 6."""
    return {
        f"a{i}": random_adapter(directory / f"a{i}", checkpoint, i, rank=1 + i % 6)
        for i in range(count)
    }


def make_engine(model: Model, modules: dict[str, Path], **config: Any) -> Engine:
    named = tuple(f"{name}={path}" for name, path in modules.items())
    fields: dict[str, Any] = {
        **{"enable_lora": True, "lora_modules": named, "max_lora_rank": 8},
        **{"kv_cache_memory": 8 << 20, "block_size": 4},
    }
    return Engine(EngineConfig(**fields | config), model=model)


def ask(request_id: str, prompt: list[int], adapter: str | None, **params: Any) -> AddRequest:
    params = {"max_tokens": 4, "temperature": 0.0} | params
    return AddRequest(request_id, prompt, SamplingParams(**params), 0.0, adapter)


def run(engine: Engine, *requests: AddRequest) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    assert outputs[-1].finish_reason in ("stop", "length"), outputs[-1]
    return [token for output in outputs for token in output.token_ids]


def change(engine: Engine, message: LoadAdapter | UnloadAdapter) -> AdapterReply:
    """Send a message and step until it is answered."""
    engine.adapters.handle(message)
    while not (replies := engine.adapters.take_replies()):
        engine.step()
    [reply] = replies
    return reply


def check_idle(engine: Engine) -> None:
    """No adapter is held, and books of slots and memory add up."""
    pool = engine.adapters.pool
    assert pool is not None
    assert all(not lora.holders and not lora.parked for lora in pool.names.values())
    pool.check()


def test_64_adapters_over_8_slots_for_1000_requests(
    checkpoint: Path, model: Model, tmp_path: Path
) -> None:
    paths = adapter_paths(checkpoint, tmp_path, 64)
    large = make_engine(model, paths, max_loras=64)
    expected = {
        (name, i): tokens(run(large, ask("x", prompt, name))["x"])
        for name in [*paths, None]
        for i, prompt in enumerate(PROMPTS)
    }
    assert len({tuple(t) for t in expected.values()}) > 100  # the adapters matter
    engine = make_engine(model, paths, max_loras=8, max_cpu_loras=32, max_num_seqs=48)
    names = [*paths, None]
    wanted = [(names[i % len(names)], i % 2) for i in range(1000)]
    requests = [ask(f"r{i}", PROMPTS[p], name) for i, (name, p) in enumerate(wanted)]
    outputs = run(engine, *requests)
    for i, key in enumerate(wanted):
        assert tokens(outputs[f"r{i}"]) == expected[key], (i, key)
    check_idle(engine)
