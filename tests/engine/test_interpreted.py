"""The engine on its GPU path without a GPU: every kernel of a step in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.models import Model, load_model
from headrace.ops import dispatch
from tests.checkpoints import random_checkpoint
from tests.engine.toy_model import add_request, run, tokens_of
from tests.models.half import in_half

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted without a GPU only"
)


def make_engine(model: Model) -> Engine:
    config = EngineConfig(
        kv_cache_memory=1 << 20, max_model_len=64, max_num_seqs=3, max_num_batched_tokens=24
    )
    return Engine(config, model=model)


def test_tokens_are_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks, decode rows, filters and penalties, tokens read a step late."""
    path = random_checkpoint(tmp_path, seed=3, num_local_experts=4, num_hidden_layers=2)
    requests = [
        add_request("long", [(7 * i + 3) % 250 for i in range(30)], max_tokens=4),
        add_request("short", [9, 8, 7], max_tokens=4, frequency_penalty=0.5),
        add_request("drawn", [9, 8], max_tokens=4, temperature=0.7, top_p=0.8, top_k=20, seed=5),
    ]
    expected = run(make_engine(load_model(path, dtype="float32")), *requests)
    model = in_half(load_model(path, dtype="bfloat16"))
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    engine = make_engine(model)
    engine.model.reserve(24, 8)
    engine.overlap = True
    got = run(engine, *requests)
    for request_id, outputs in expected.items():
        assert tokens_of(got[request_id]) == tokens_of(outputs)
