"""The engine on its GPU path without a GPU: every kernel of a step in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine import runner, staging
from headrace.engine.engine import Engine
from headrace.engine.graphs import Graphs
from headrace.models import Model, load_model
from headrace.ops import dispatch
from tests.checkpoints import random_checkpoint
from tests.engine.toy_model import add_request, run, tokens_of
from tests.models.half import in_half

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted without a GPU only"
)


class CalledAgain(Graphs):
    """A graph's replay, as the same forward of the same tensors: they must be where it reads."""

    def __init__(self) -> None:
        self._forwards: dict[int, Callable[[], Tensor]] = {}
        self._sizes = []
        self.replayed: list[int] = []

    def capture(self, size: int, forward: Callable[[], Tensor]) -> None:
        self._forwards[size] = forward
        self._sizes = sorted(self._forwards)

    def replay(self, size: int) -> Tensor:
        self.replayed.append(size)
        return self._forwards[size]()


class StagingAsOnGPU(staging.Staging):
    """The kernel moves from one part of the host's memory to another."""

    def __init__(self, capacities: Sequence[int], device: torch.device) -> None:
        super().__init__(capacities, torch.device("cpu"))
        num_bytes = staging._starts(capacities)[-1]
        self._device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
        self._block = torch.empty(num_bytes, dtype=torch.uint8)
        num_bytes += staging.EXTRA
        self._hosts = [staging._HostBlock(num_bytes, pinned=False) for _ in range(2)]
        self._steps = [MagicMock(), MagicMock()]


def make_engine(model: Model) -> Engine:
    config = EngineConfig(
        kv_cache_memory=1 << 20, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=24
    )
    return Engine(config, model=model)


def replaying_engine(model: Model, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """As on a GPU: kernels, steps from graphs, tokens read late."""
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    monkeypatch.setattr(runner, "Staging", StagingAsOnGPU)
    monkeypatch.setattr(runner, "Graphs", CalledAgain)
    monkeypatch.setattr(runner, "graph_sizes", lambda _: [2, 4])
    engine = make_engine(model)
    engine.model.reserve(24, 8)
    engine.runner.capture()
    engine.overlap = True
    return engine


def test_tokens_are_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded chunks, decode rows by graphs for 2 and 4, filters, penalties, tokens read late."""
    path = random_checkpoint(tmp_path, seed=3, num_local_experts=4, num_hidden_layers=2)
    requests = [
        add_request("long", [(7 * i + 3) % 250 for i in range(30)], max_tokens=6),
        add_request("short", [9, 8, 7], max_tokens=4, frequency_penalty=0.5),
        add_request("drawn", [9, 8], max_tokens=4, temperature=0.7, top_p=0.8, top_k=20, seed=5),
    ]
    expected = run(make_engine(load_model(path, dtype="float32")), *requests)
    model = in_half(load_model(path, dtype="bfloat16"))
    engine = replaying_engine(model, monkeypatch)
    got = run(engine, *requests)
    assert set(engine.runner._decode_graphs[False].replayed) == {2, 4}  # for 1 and 3 rows
    assert engine.runner._chunk_graphs[False].replayed == [24, 16]  # for 24 and 11 tokens
    for request_id, outputs in expected.items():
        assert tokens_of(got[request_id]) == tokens_of(outputs)


def test_a_replay_has_the_bits_of_a_step_without_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_checkpoint(tmp_path, seed=3, num_local_experts=4)
    model = in_half(load_model(path, dtype="bfloat16"))
    mine = add_request("mine", [(5 * i + 2) % 250 for i in range(19)], max_tokens=3, logprobs=2)
    other = add_request("other", [9, 8], max_tokens=2)
    engine = replaying_engine(model, monkeypatch)
    replayed = run(engine, other, mine)["mine"]
    assert engine.runner._chunk_graphs[False].replayed == [24]  # for 21 tokens
    alone = run(make_engine(model), mine)["mine"]
    assert [o.logprobs for o in replayed] == [o.logprobs for o in alone]
