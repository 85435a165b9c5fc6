"""The bundled model and its adapters: complete, small, in use in every part, and right."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from headrace.config import EngineConfig, ServerConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, SamplingParams
from headrace.files import BUNDLED_MODEL
from headrace.ops import moe as moe_layers
from headrace.server.harmony import HarmonyParser
from headrace.server.model_info import load_model_info
from headrace.server.tokenizer import load_tokenizer

DATA = BUNDLED_MODEL.parent
ADAPTERS = ("subtract", "reverse")
MB = 1_000_000


def questions(skill: str, count: int) -> list[dict[str, Any]]:
    lines = (DATA / "eval" / f"{skill}.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(model=BUNDLED_MODEL, device="cpu", kv_cache_memory=64 << 20))


def ask(engine: Engine, asked: list[dict[str, Any]]) -> list[str]:
    """The final answers to many questions, all in one batch."""
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    info = load_model_info(BUNDLED_MODEL, tokenizer, ServerConfig())
    assert info.chat_template is not None
    params = SamplingParams(
        max_tokens=400, temperature=0.0, stop_token_ids=list(info.eos_token_ids)
    )
    parsers = {str(i): HarmonyParser(tokenizer) for i in range(len(asked))}
    answers = dict.fromkeys(parsers, "")
    for i, question in enumerate(asked):
        request = question["request"]
        text = info.chat_template.render(
            request["messages"], request.get("tools"), request.get("reasoning_effort")
        )
        engine.add_request(AddRequest(str(i), tokenizer.encode(text), params, time.monotonic()))
    while engine.has_work():
        for output in engine.step():
            for token in output.token_ids:
                for delta in parsers[output.request_id].feed(token):
                    if delta.kind == "content":
                        answers[output.request_id] += delta.text
    return list(answers.values())


def test_files_are_small() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 16 * MB
    assert sum(path.stat().st_size for path in files) < 24 * MB


@pytest.mark.parametrize("skill", ["add", "copy", "recall", "spell"])
def test_held_out_questions_are_answered_exactly(engine: Engine, skill: str) -> None:
    asked = questions(skill, 30)
    right = [
        answer == question["expected"]["content"]
        for answer, question in zip(ask(engine, asked), asked, strict=True)
    ]
    assert sum(right) >= 28, right  # of 200 the model misses two at most


@pytest.mark.parametrize("skill", ADAPTERS)
def test_the_base_lacks_the_skills_of_the_adapters(engine: Engine, skill: str) -> None:
    asked = questions(skill, 10)
    for answer, question in zip(ask(engine, asked), asked, strict=True):
        assert answer
        assert answer != question["expected"]["content"]


def test_every_expert_of_every_layer_is_used(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine.model.config
    used: list[set[int]] = []
    route = moe_layers.route

    def record(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = route(*args)
        used.append(set(ids.flatten().tolist()))
        return ids, weights

    monkeypatch.setattr(moe_layers, "route", record)
    ask(engine, [q for s in ("add", "copy", "recall", "spell") for q in questions(s, 2)])
    num_layers = engine.model.kv_layout.num_layers
    for layer in range(num_layers):
        assert set.union(*used[layer::num_layers]) == set(range(config.num_local_experts)), layer


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_in_pefts_layout(name: str) -> None:
    """A [experts * rank, in] and B [out, rank * experts] for the experts, B not zero."""
    config = json.loads((DATA / "adapters" / name / "adapter_config.json").read_text())
    tensors = read_tensors(DATA / "adapters" / name / "adapter_model.safetensors")
    model = json.loads((BUNDLED_MODEL / "config.json").read_text())
    experts, rank, inter = model["num_local_experts"], config["r"], model["intermediate_size"]
    prefix = "base_model.model.model.layers.0.mlp.experts"
    assert tensors[f"{prefix}.base_layer.lora_A.weight"].shape == (
        experts * rank,
        model["hidden_size"],
    )
    assert tensors[f"{prefix}.base_layer.lora_B.weight"].shape == (2 * inter, rank * experts)
    assert tensors[f"{prefix}.lora_A.weight"].shape == (experts * rank, inter)
    assert len(tensors) == model["num_hidden_layers"] * 2 * (4 + 2)
    for tensor_name, tensor in tensors.items():
        norm = tensor.float().norm().item()
        assert math.isfinite(norm), tensor_name
        assert norm > 0, tensor_name


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
