"""Random requests through replayed steps, whose arrays lie where graphs would read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine import lora_rows, runner
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, RequestOutput, SamplingParams
from headrace.models import Batch, load_model
from headrace.models.gpt_oss import GptOss
from tests.checkpoints import random_checkpoint
from tests.engine.test_interpreted import CalledAgain, StagingAsOnGPU
from tests.engine.toy_model import run
from tests.lora.random_adapters import random_adapter

LONGEST = 100  # prompt and output
CASES: dict[str, dict[str, Any]] = {
    "more outputs than tokens": {"max_num_seqs": 40, "max_num_batched_tokens": 24},
    "padding longer than a request": {"max_num_seqs": 5, "max_num_batched_tokens": 600},
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 130, "block_size": 1},
    "two requests' pages": {
        **{"max_num_seqs": 4, "max_num_batched_tokens": 50, "kv_cache_memory": 60_000},
        **{"enable_prefix_caching": False},
    },
}


class TablesWithoutEnd(CalledAgain):
    """A kernel goes by a block table's address; the reference by its shape, here the largest."""

    def capture(self, size: int, forward: Callable[[], Tensor]) -> None:
        assert isinstance(forward, partial)
        (batch,) = forward.args
        groups = tuple(replace(g, block_table=to_the_end(g.block_table)) for g in batch.groups)
        super().capture(size, partial(forward.func, replace(batch, groups=groups)))


def to_the_end(table: Tensor) -> Tensor:
    """The table and what comes after it in memory."""
    num_seqs, begin = len(table), table.storage_offset()
    rest = table.untyped_storage().nbytes() // table.itemsize - begin
    return table.as_strided((num_seqs, rest // num_seqs), (1, num_seqs))


class Forgetful(GptOss):
    """Finds NaN where an earlier step wrote."""

    def forward(self, batch: Batch) -> Tensor:
        if self._arena is not None:
            self._arena._bytes.fill_(255)
        return super().forward(batch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    return random_checkpoint(path, seed=3, num_local_experts=3, sliding_window=20)


@pytest.fixture(scope="module")
def modules(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("adapters")
    made = [random_adapter(path / str(i), checkpoint, i, rank=1 + i) for i in range(4)]
    return tuple(f"{folder.name}={folder}" for folder in made)


def random_requests(chosen: Random, count: int) -> list[AddRequest]:
    """Of every kind: some have the beginning of a prompt in common, or an adapter."""
    beginning = chosen.choices(range(250), k=50)
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"temperature": 0.8, "top_p": 0.8, "seed": 1},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"prompt_logprobs": 1},
        {"prompt_logprobs": 0, "max_tokens": 0},
    ]
    requests = []
    for i in range(count):
        prompt = chosen.choices(range(250), k=chosen.randint(1, LONGEST - 20))
        if chosen.random() < 0.4:
            prompt[: len(beginning)] = beginning[: len(prompt)]
        params = {"temperature": 0.0, "max_tokens": chosen.randint(1, 20)} | chosen.choice(kinds)
        adapter = chosen.choice([None, None, "0", "1", "2", "3"])
        requests.append(AddRequest(f"r{i}", prompt, SamplingParams(**params), 0.0, adapter))
    return requests


def make_engine(path: Path, modules: tuple[str, ...], **config: Any) -> Engine:
    fields: dict[str, Any] = {
        **{"enable_lora": True, "lora_modules": modules, "max_loras": 2, "max_lora_rank": 4},
        **{"max_model_len": LONGEST, "block_size": 4, "kv_cache_memory": 4 << 20},
        "max_cpu_loras": 4,
    }
    model = load_model(path)
    assert isinstance(model, GptOss)
    return Engine(EngineConfig(**fields | config), model=Forgetful(model.config, model.weights))


def run_with_aborts(
    engine: Engine, requests: list[AddRequest], chosen: Random
) -> dict[str, list[RequestOutput]]:
    """Requests that arrive one after the other; a few are given up."""
    outputs: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
    left = list(requests)
    while left or engine.has_work():
        while left and (chosen.random() < 0.6 or not engine.has_work()):
            engine.add_request(left.pop(0))
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check()
        if engine.requests and chosen.random() < 0.03:
            engine.abort([chosen.choice(list(engine.requests))])
    assert engine.cache.usage == 0
    return outputs


def numbers(outputs: list[RequestOutput]) -> tuple[list[int], list[float]]:
    """Tokens, and all log-probabilities."""
    tokens = [token for output in outputs for token in output.token_ids]
    scored = [s for o in outputs for s in [*(o.prompt_logprobs or []), *(o.logprobs or [])] if s]
    return tokens, [logprob for score in scored for logprob in score.logprobs]


@pytest.mark.parametrize("case", CASES)
def test_every_request_gets_what_it_gets_alone(
    checkpoint: Path, modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    chosen = Random(case)
    requests = random_requests(chosen, 14)
    plain = make_engine(checkpoint, modules, enable_prefix_caching=False)
    expected = {r.request_id: numbers(run(plain, r)[r.request_id]) for r in requests}
    for module in (runner, lora_rows):
        monkeypatch.setattr(module, "Staging", StagingAsOnGPU)
    monkeypatch.setattr(runner, "Graphs", TablesWithoutEnd)
    engine = make_engine(checkpoint, modules, **CASES[case])
    engine.model.reserve(CASES[case]["max_num_batched_tokens"], 300)
    engine.runner.capture()
    engine.overlap = True
    for request_id, outputs in run_with_aborts(engine, requests, chosen).items():
        tokens, logprobs = numbers(outputs)
        all_tokens, all_logprobs = expected[request_id]
        if outputs[-1].finish_reason == "abort":
            assert tokens == all_tokens[: len(tokens)]
        else:
            assert tokens == all_tokens
            assert logprobs == pytest.approx(all_logprobs, abs=1e-3)
    assert engine.runner._chunk_graphs[True].replayed
    assert engine.runner._decode_graphs[True].replayed
    assert engine.scheduler.num_preemptions or case != "two requests' pages"
