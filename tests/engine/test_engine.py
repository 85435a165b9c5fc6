"""The whole engine on the exact toy model: tokens never depend on what else is going on."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import ConfigError
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, RequestOutput
from tests.engine.toy_model import (
    VOCAB,
    WINDOWS,
    ToyModel,
    add_request,
    pages_to_bytes,
    run,
    tokens_of,
    toy_engine,
)


@dataclass
class Arrival:
    step: int
    request: AddRequest
    abort_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Requests whose prompts often share a prefix, with parameters of every kind."""
    prefix = draw(st.lists(st.integers(0, VOCAB - 1), min_size=12, max_size=24))
    found = []
    for i in range(draw(st.integers(1, 8))):
        shared = prefix[: draw(st.integers(0, len(prefix)))]
        own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14))
        params: dict[str, Any] = {"max_tokens": draw(st.integers(1, 16))}
        if draw(st.booleans()):
            params |= {"temperature": 0.9, "top_p": 0.9, "top_k": 7, "seed": draw(st.integers())}
        if draw(st.booleans()):
            params |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 2}
            params |= {"stop_token_ids": [1, 2, 3, 4]}
        if draw(st.integers(0, 3)) == 0:
            params |= {"logprobs": 2, "prompt_logprobs": 1}
        request = add_request(f"r{i}", shared + own, **params)
        abort_at = draw(st.integers(0, 30)) if draw(st.integers(0, 4)) == 0 else None
        found.append(Arrival(draw(st.integers(0, 12)), request, abort_at))
    return found


def alone(request: AddRequest, windows: tuple[int, ...] = WINDOWS) -> list[RequestOutput]:
    """What the request gets from a large engine of its own, without a prefix cache."""
    engine = toy_engine(ToyModel(windows), enable_prefix_caching=False)
    return run(engine, request)[request.request_id]


def drive(engine: Engine, work: list[Arrival]) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {a.request.request_id: [] for a in work}
    step, most = 0, 10_000
    while step < most and (engine.has_work() or any(a.step >= step for a in work)):
        for arrival in work:
            if arrival.step == step:
                engine.add_request(arrival.request)
            if arrival.abort_at is not None and arrival.step + arrival.abort_at == step:
                engine.abort([arrival.request.request_id])
                engine.check()
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check()
        step += 1
    assert step < most, "the engine makes no progress"
    return outputs


@settings(max_examples=100, deadline=None)
@given(
    work=arrivals(),
    windows=st.sampled_from([WINDOWS, WINDOWS, (0,), (6,), (4, 0, 9)]),
    pages=st.integers(14, 40),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(1, 40),
    prefix_caching=st.booleans(),
    overlap=st.booleans(),
)
def test_requests_get_the_tokens_they_get_alone(
    work: list[Arrival],
    windows: tuple[int, ...],
    pages: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    prefix_caching: bool,
    overlap: bool,
) -> None:
    engine = toy_engine(
        ToyModel(windows),
        overlap=overlap,
        kv_cache_memory=pages_to_bytes(pages, 4),
        max_model_len=54,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=prefix_caching,
    )
    outputs = drive(engine, work)
    for arrival in work:
        request, got = arrival.request, outputs[arrival.request.request_id]
        if got[-1].finish_reason == "abort":
            assert arrival.abort_at is not None
            tokens = [token for output in got for token in output.token_ids]
            assert tokens == tokens_of(alone(request, windows))[: len(tokens)]
            continue
        expected = alone(request, windows)
        assert tokens_of(got) == tokens_of(expected)
        assert got[-1].finish_reason == expected[-1].finish_reason
        assert [o.logprobs for o in got] == [o.logprobs for o in expected]
        assert [o.prompt_logprobs for o in got] == [o.prompt_logprobs for o in expected]
    assert engine.cache.usage == 0
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_a_tiny_cache_preempts_and_loses_nothing() -> None:
    engine = toy_engine(kv_cache_memory=pages_to_bytes(14, 4), max_num_seqs=4, max_model_len=48)
    requests = [add_request(f"r{i}", [i, 5, 9, 2, 7] * 3, max_tokens=24) for i in range(4)]
    outputs = run(engine, *requests)
    assert engine.stats().num_preemptions > 0
    for request in requests:
        assert tokens_of(outputs[request.request_id]) == tokens_of(alone(request))


class ForgetfulModel(ToyModel):
    """A model with a bug: it does not write the keys of odd slots."""

    def forward(self, batch: Any) -> Any:
        before = [cache.clone() for cache in batch.kv_cache]
        logits = super().forward(batch)
        for cache, old in zip(batch.kv_cache, before, strict=True):
            cache[:, :, 1::2] = old[:, :, 1::2]
        return logits


def test_the_toy_model_notices_lost_writes() -> None:
    request = add_request("a", [3, 1, 4, 1, 5, 9], max_tokens=8)
    wrong = run(toy_engine(ForgetfulModel()), request)["a"]
    assert tokens_of(wrong) != tokens_of(alone(request))


def test_a_cancel_storm_leaves_nothing_behind() -> None:
    engine = toy_engine(kv_cache_memory=pages_to_bytes(14, 4), max_num_seqs=4, max_model_len=40)
    canary = add_request("canary", [3, 1, 4, 1, 5], max_tokens=30)
    engine.add_request(canary)
    tokens: list[int] = []
    for i in range(200):
        engine.add_request(add_request(f"r{i}", [i % VOCAB] * (1 + i % 20), max_tokens=15))
        engine.abort([f"r{i - i % 7}"])
        tokens += [t for o in engine.step() if o.request_id == "canary" for t in o.token_ids]
        engine.check()
    engine.abort(list(engine.requests))
    assert engine.cache.usage == 0
    assert tokens == tokens_of(alone(canary))
    assert {output.finish_reason for output in engine.step()} == {"abort"}
    assert tokens_of(run(engine, add_request("fresh", [1, 2]))["fresh"])


def test_a_shared_prefix_is_computed_once() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    prompt = list(range(30))
    first = run(engine, add_request("a", prompt, max_tokens=1))["a"]
    rows = model.num_rows
    again = run(engine, add_request("b", prompt, max_tokens=1))["b"]
    assert model.num_rows - rows == 2  # 7 blocks of 4 are found, 2 tokens are left
    assert (first[0].num_cached_tokens, again[0].num_cached_tokens) == (0, 28)
    assert tokens_of(again) == tokens_of(first)
    assert engine.stats().prefix_cache_hits == 28


def test_only_tokens_that_are_looked_up_count_as_queries() -> None:
    prompt = list(range(30))
    for enable, params, queries in (
        (True, {}, 60),
        (True, {"prompt_logprobs": 0}, 30),
        (False, {}, 0),
    ):
        engine = toy_engine(enable_prefix_caching=enable)
        run(engine, add_request("a", prompt))
        run(engine, add_request("b", prompt, **params))
        assert engine.stats().prefix_cache_queries == queries


def test_a_preempted_request_is_looked_up_once() -> None:
    engine = toy_engine(kv_cache_memory=pages_to_bytes(14, 4), max_num_seqs=4, max_model_len=48)
    run(engine, *[add_request(f"r{i}", [i, 5, 9, 2, 7] * 3, max_tokens=24) for i in range(4)])
    assert engine.stats().num_preemptions > 0
    assert engine.stats().prefix_cache_queries == 4 * 15
    assert engine.stats().prefix_cache_hits == 0


def test_the_last_prompt_token_is_always_computed() -> None:
    engine = toy_engine()
    prompt = list(range(16))
    run(engine, add_request("a", prompt, max_tokens=4))
    again = run(engine, add_request("b", prompt, max_tokens=4))["b"]
    assert again[0].num_cached_tokens == 12


def test_an_adapter_without_a_pool_is_refused() -> None:
    engine = toy_engine()
    [refusal] = run(engine, add_request("a", [1, 2], adapter="other"))["a"]
    assert refusal.finish_reason == "error"
    assert refusal.error is not None
    assert "'other' is not loaded" in refusal.error


def test_prompt_logprobs_ignore_the_prefix_cache() -> None:
    engine = toy_engine(max_num_batched_tokens=7)
    prompt = list(range(30))
    run(engine, add_request("a", prompt))
    scored = run(engine, add_request("b", prompt, max_tokens=0, prompt_logprobs=3))["b"]
    assert len(scored) == 1
    assert scored[0].token_ids == []
    assert scored[0].finish_reason == "length"
    assert scored[0].num_cached_tokens == 0
    logprobs = scored[0].prompt_logprobs
    assert logprobs is not None
    assert logprobs[0] is None
    assert [entry.token_ids[0] for entry in logprobs[1:] if entry] == prompt[1:]
    assert all(len(entry.token_ids) == 4 for entry in logprobs[1:] if entry)
    assert (
        logprobs
        == alone(add_request("c", prompt, max_tokens=0, prompt_logprobs=3))[0].prompt_logprobs
    )


def test_finish_reasons() -> None:
    free = tokens_of(alone(add_request("a", [1, 2, 3], max_tokens=10)))
    stop = free[4]
    outputs = alone(add_request("a", [1, 2, 3], max_tokens=10, stop_token_ids=[stop]))
    first = free.index(stop)
    assert tokens_of(outputs) == free[: first + 1]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == stop
    engine = toy_engine(max_model_len=6)
    outputs = run(engine, add_request("a", [1, 2, 3], max_tokens=10))["a"]
    assert tokens_of(outputs) == free[:3]
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].stop_token_id is None


def test_min_tokens_masks_stop_tokens() -> None:
    every = list(range(VOCAB - 1))
    request = add_request("a", [1, 2, 3], max_tokens=10, min_tokens=4, stop_token_ids=every)
    assert tokens_of(alone(request))[:4] == [VOCAB - 1] * 4
    assert len(tokens_of(alone(request))) >= 5


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (add_request("a", []), "prompt is empty"),
        (add_request("a", [1] * 64), "at most 63 .max_model_len is 64"),
        (add_request("a", [1, VOCAB]), "prompt_token_ids has token id 32"),
        (add_request("a", [-1]), "prompt_token_ids has token id -1"),
        (add_request("a", [1], logit_bias={99: 1.0}), "logit_bias has token id 99"),
        (add_request("a", [1], allowed_token_ids=[]), "allowed_token_ids is empty"),
        (add_request("a", [1], max_tokens=0), "max_tokens is 0"),
        (add_request("a", [1], logprobs=33), "logprobs is 33; it must be 0 to 32"),
        (add_request("a", [1], prompt_logprobs=-1), "prompt_logprobs is -1; it must be 0 to 32"),
        (
            add_request("a", [1], allowed_token_ids=[3], stop_token_ids=[3], min_tokens=1),
            "every allowed_token_ids entry is a stop token",
        ),
    ],
)
def test_requests_that_cannot_run_are_answered(request_: AddRequest, text: str) -> None:
    engine = toy_engine(max_model_len=64)
    good = add_request("good", [1, 2, 3])
    outputs = run(engine, request_, good)
    assert outputs["a"][0].finish_reason == "error"
    assert re.search(text, outputs["a"][0].error or "")
    assert tokens_of(outputs["good"]) == tokens_of(alone(good))


def test_a_request_id_in_use_is_refused() -> None:
    engine = toy_engine()
    engine.add_request(add_request("a", [1, 2]))
    engine.add_request(add_request("a", [3, 4]))
    outputs = engine.step()
    assert [o.finish_reason for o in outputs] == ["error", None]
    assert outputs[0].error is not None
    assert "already in use" in outputs[0].error


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_frees_its_pages_at_once(steps: int) -> None:
    engine = toy_engine(max_num_batched_tokens=8)
    engine.add_request(add_request("a", list(range(20)), max_tokens=50))
    for _ in range(steps):
        engine.step()
    assert (engine.cache.usage > 0) == (steps > 0)
    engine.abort(["a", "unknown"])
    assert engine.cache.usage == 0
    assert [o.finish_reason for o in engine.step()] == ["abort"]
    assert not engine.has_work()
    engine.check()


def test_unseeded_requests_differ_and_repeat() -> None:
    def sampled(request_id: str, **config: Any) -> list[int]:
        request = add_request(request_id, [1, 2, 3], temperature=1.0, max_tokens=12)
        return tokens_of(run(toy_engine(**config), request)[request_id])

    assert sampled("a") == sampled("a")
    assert sampled("a") != sampled("b")
    assert sampled("a") != sampled("a", seed=1)


def test_earlier_arrivals_go_first() -> None:
    engine = toy_engine(max_num_seqs=1)
    for request_id, arrival in (("late", 2.0), ("early", 1.0)):
        message = add_request(request_id, [1, 2, 3], max_tokens=1)
        engine.add_request(
            AddRequest(request_id, message.prompt_token_ids, message.params, arrival)
        )
    assert [o.request_id for o in engine.step()] == ["early"]
    assert [o.request_id for o in engine.step()] == ["late"]


def test_a_cache_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max-model-len is 200, too long"):
        toy_engine(kv_cache_memory=pages_to_bytes(12, 4), max_model_len=200)
    with pytest.raises(ConfigError, match="too few for one request"):
        toy_engine(kv_cache_memory=100)
