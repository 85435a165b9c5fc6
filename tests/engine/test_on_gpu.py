"""The engine on a GPU: near the references, and the same bits whatever else is in the batch.

The model has gpt-oss-20b's width and two layers; its weights are random and well-behaved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.bench.synth import SIZES, write_synthetic
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, RequestOutput, SamplingParams
from headrace.files import BUNDLED_MODEL
from tests.engine.toy_model import run
from tests.oracles import transformers_model

pytestmark = pytest.mark.gpu

PROMPT = [(i * 7919 + 13) % 150_000 for i in range(300)]  # beyond two windows and many pages


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    layers = ["sliding_attention", "full_attention"]
    config = SIZES["20b"] | {"num_hidden_layers": 2, "layer_types": layers}
    write_synthetic(path, config, seed=0)
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    yield make_engine(checkpoint)
    torch.cuda.empty_cache()


def make_engine(path: Path, **config: Any) -> Engine:
    defaults = {"kv_cache_memory": 1 << 30, "max_model_len": 4096, "max_num_seqs": 65}
    return Engine(EngineConfig(model=path, device="cuda", **defaults | config))


def ask(request_id: str, prompt: Sequence[int], **params: Any) -> AddRequest:
    values = {"max_tokens": 24, "temperature": 0.0, "logprobs": 2} | params
    return AddRequest(request_id, list(prompt), SamplingParams(**values), 0.0)


def answer(outputs: list[RequestOutput]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities, bit for bit."""
    assert outputs[-1].finish_reason in ("stop", "length"), outputs[-1]
    scores = [score for output in outputs for score in output.logprobs or []]
    return [(score.token_ids, score.logprobs) for score in scores]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[tuple[list[int], list[float]]]:
    found = answer(run(engine, ask("alone", PROMPT))["alone"])
    assert len(found) == 24
    assert len({tokens[0] for tokens, _ in found}) > 1
    return found


def test_among_64_strangers(engine: Engine, alone: list) -> None:
    strangers = [
        ask(f"s{i}", [(j * 31 + i) % 90_000 for j in range(5 + 11 * i)], temperature=0.8, seed=i)
        for i in range(64)
    ]
    outputs = run(engine, *strangers[:32], ask("mine", PROMPT), *strangers[32:])
    assert answer(outputs["mine"]) == alone
    assert answer(outputs["s3"]) != alone


@pytest.mark.parametrize("chunk", [7, 64, 129])
def test_in_chunks(checkpoint: Path, alone: list, chunk: int) -> None:
    engine = make_engine(checkpoint, max_num_batched_tokens=chunk, max_num_seqs=4)
    assert answer(run(engine, ask("mine", PROMPT))["mine"]) == alone


def test_with_a_prefix_hit(engine: Engine, alone: list) -> None:
    run(engine, ask("first", PROMPT[:200] + [5] * 100))
    outputs = run(engine, ask("mine", PROMPT))["mine"]
    assert outputs[0].num_cached_tokens > 100
    assert answer(outputs) == alone


def test_after_preemption(checkpoint: Path, alone: list) -> None:
    """A cache for three prompts, but not for all of their outputs."""
    engine = make_engine(checkpoint, kv_cache_memory=3_450_000, max_model_len=400, max_num_seqs=3)
    others = [ask(f"o{i}", PROMPT[i + 1 :], max_tokens=90) for i in range(2)]
    outputs = run(engine, others[0], others[1], ask("mine", PROMPT))
    assert engine.scheduler.num_preemptions
    assert answer(outputs["mine"]) == alone


def test_in_the_last_pages_of_a_large_cache(checkpoint: Path, alone: list) -> None:
    """Elements beyond 2 ** 32 from a tensor's first."""
    engine = make_engine(checkpoint, kv_cache_memory=20 << 30, max_num_seqs=4)
    full = engine.runner.kv_cache[1]
    assert full[0].numel() > 2**32
    for pool in engine.cache.pools:
        pool.free = OrderedDict(reversed(pool.free.items()))
    engine.add_request(ask("mine", PROMPT))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert answer(outputs) == alone
    assert full[:, -1].any()


def test_memory_that_is_not_there_is_told_with_its_flag(checkpoint: Path) -> None:
    for flag, value in (("kv_cache_memory", 160 << 30), ("max_num_batched_tokens", 1 << 21)):
        with pytest.raises(ConfigError, match=f"lower --{flag.replace('_', '-')}"):
            make_engine(checkpoint, **{flag: value})


def test_logits_are_near_transformers(checkpoint: Path) -> None:
    """bfloat16 against float32 on the dequantized weights, on the same GPU."""
    engine = make_engine(checkpoint, enable_prefix_caching=False)
    request = ask("p", PROMPT, max_tokens=0, prompt_logprobs=0, logprobs=None)
    scores = run(engine, request)["p"][-1].prompt_logprobs or []
    oracle = transformers_model(checkpoint).cuda()
    with torch.inference_mode():
        logits = oracle(torch.tensor([PROMPT], device="cuda")).logits[0]
    expected = logits.log_softmax(-1)[:-1].cpu()
    got = torch.tensor([score.logprobs[0] for score in scores[1:] if score])
    chosen = expected.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    difference = (got - chosen).abs()
    ranks = torch.tensor([score.rank for score in scores[1:] if score])
    exact_ranks = (expected > chosen[:, None]).sum(1) + 1
    same_top = ((ranks == 1) == (exact_ranks == 1)).float().mean()
    print(f"largest difference {difference.max():.4f}, mean {difference.mean():.4f}, {same_top=}")
    # on the CPU bfloat16 was 0.7 and 0.022 off: a row whose experts are nearly tied takes others
    assert difference.max() < 1.5
    assert difference.mean() < 0.045
    shifted = (got - chosen.roll(1)).abs()
    assert shifted.mean() > 10 * difference.mean()


def test_the_bundled_model_answers_as_on_the_cpu() -> None:
    """Greedy tokens, and log-probabilities: bfloat16 against float32 (on the CPU 0.08 apart)."""
    words = [[17 + i, 300, 45, 900 + i, 12, 7 * i + 20] * 4 for i in range(8)]
    requests = [ask(f"r{i}", prompt, max_tokens=32) for i, prompt in enumerate(words)]
    found = []
    for device in ("cpu", "cuda"):
        config = EngineConfig(model=BUNDLED_MODEL, device=device, kv_cache_memory=64 << 20)
        found.append(run(Engine(config), *requests))
    for request in requests:
        cpu, gpu = (answer(outputs[request.request_id]) for outputs in found)
        for (tokens, scores), (gpu_tokens, gpu_scores) in zip(cpu, gpu, strict=True):
            assert abs(scores[0] - gpu_scores[0]) < 0.2 or tokens[0] != gpu_tokens[0]
            if tokens[0] != gpu_tokens[0]:
                assert scores[1] - scores[2] < 0.3, "not a near tie"
                break


def test_a_step_does_not_wait_for_the_gpu(engine: Engine) -> None:
    """Nothing between two launches but the read of the step before synchronises."""
    requests = [ask(f"n{i}", PROMPT[: 50 + i], logprobs=None) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    engine.step()
    plan = engine.scheduler.schedule()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = engine._launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launched.sampled is not None
    assert len(launched.sampled.read()) == 4
    engine.abort([request.request_id for request in requests])
    engine._launched = None
    while engine.has_work():
        engine.step()


def test_a_decode_step_allocates_nothing(engine: Engine) -> None:
    """The forward of a decode step: graph or not, its tensors come from the arena."""
    requests = [ask(f"m{i}", PROMPT[: 20 + i], logprobs=None) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    for _ in range(4):
        engine.step()
    plan = engine.scheduler.schedule()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    engine.runner.forward(plan, range(len(plan)))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    engine.abort([request.request_id for request in requests])
    while engine.has_work():
        engine.step()
