"""The engine on a real gpt-oss: a batch, chunks and cache hits give the tokens of a plain loop."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.models import Batch, KVGroup, Model, load_model
from tests.checkpoints import random_checkpoint
from tests.engine.toy_model import add_request, run, tokens_of

VOCAB = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    return load_model(random_checkpoint(path, seed=11, num_hidden_layers=3))


def engine(model: Model, **config: object) -> Engine:
    config = {"block_size": 4, "kv_cache_memory": 1 << 20} | config
    return Engine(EngineConfig(**config), model=model)  # type: ignore[arg-type]


def next_token(model: Model, tokens: list[int]) -> int:
    """Argmax after one forward over the whole sequence, on a fresh cache of one page."""
    n, layout = len(tokens), model.kv_layout
    table, slots = torch.zeros(1, 1, dtype=torch.int32), torch.arange(n)
    shape = (2, 1, n, layout.num_kv_heads, layout.head_dim)
    batch = Batch(
        token_ids=torch.tensor(tokens),
        positions=torch.arange(n),
        query_start=torch.tensor([0, n], dtype=torch.int32),
        seq_lens=torch.tensor([n], dtype=torch.int32),
        groups=tuple(KVGroup(table, slots, window) for window in layout.windows),
        output_rows=torch.tensor([n - 1]),
        kv_cache=tuple(torch.zeros(shape, dtype=model.dtype) for _ in layout.group_of_layer),
    )
    return int(model.forward(batch).argmax())


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    shared=st.integers(0, 30),
    max_num_batched_tokens=st.integers(3, 64),
    kv_cache_memory=st.sampled_from([1 << 15, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_tokens_are_those_of_a_plain_loop(
    model: Model,
    lengths: list[int],
    shared: int,
    max_num_batched_tokens: int,
    kv_cache_memory: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, VOCAB, (6, 40), generator=generator).tolist()
    prompts = [numbers[5][:shared] + numbers[i][:n] for i, n in enumerate(lengths)]
    small = engine(
        model,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        max_num_seqs=4,
    )
    room = small.max_model_len - 1 - max(map(len, prompts))
    if room < 1:
        return
    requests = [
        add_request(f"r{i}", prompt, max_tokens=min(room, 6)) for i, prompt in enumerate(prompts)
    ]
    outputs = run(small, *requests)
    for request in requests:
        tokens = list(request.prompt_token_ids)
        for token in tokens_of(outputs[request.request_id]):
            assert token == next_token(model, tokens)
            tokens.append(token)


def test_prompt_logprobs_are_those_of_the_model(model: Model) -> None:
    prompt = torch.randint(0, VOCAB, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    request = add_request("a", prompt, max_tokens=0, prompt_logprobs=1)
    whole = run(engine(model), request)["a"][0].prompt_logprobs
    chunked = run(engine(model, max_num_batched_tokens=7), request)["a"][0].prompt_logprobs
    assert whole is not None
    assert chunked is not None
    assert len(whole) == len(chunked) == 50
    for i in range(1, 50):
        first, second = whole[i], chunked[i]
        assert first is not None
        assert second is not None
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)
        assert first.token_ids[1] == next_token(model, prompt[:i])


def test_sampling_is_reproducible(model: Model) -> None:
    def sampled(count: int, **config: int) -> list[int]:
        requests = [
            add_request(f"r{i}", [i, 5, 7], temperature=1.0, top_p=0.95, seed=i, max_tokens=20)
            for i in range(count)
        ]
        return tokens_of(run(engine(model, **config), *requests)["r0"])

    assert sampled(1) == sampled(4, max_num_batched_tokens=5)
