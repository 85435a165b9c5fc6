"""An exact little model of the model interface: its logits are a hash of what a token sees.

Layer 0 (full attention) and layer 1 (a window) keep (token, position) of every token in the paged
cache, as integers. The logits of a row hash what both layers read back through the block tables,
so that a wrong page, a missed write or a stale read changes the tokens.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, RequestOutput, SamplingParams
from headrace.models.batch import Batch, KVGroup, KVLayout

VOCAB = 32
WINDOWS = (0, 6)
PRIME = 2**31 - 1
TOKEN_BYTES = 2 * 8  # of one layer: k and v, one head of one int64


class ToyModel:
    """windows: one layer and one KV group for each."""

    def __init__(self, windows: tuple[int, ...] = WINDOWS, max_positions: int = 256) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.int64
        self.config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=max_positions)
        layers = tuple(range(len(windows)))
        self.kv_layout = KVLayout(len(windows), 1, 1, 1, windows, layers)
        self.num_rows = 0

    def reserve(self, max_num_tokens: int, max_num_outputs: int) -> None:
        """Nothing: every step allocates its own."""

    def forward(self, batch: Batch) -> Tensor:
        self.num_rows += len(batch.token_ids)
        late = batch.token_ids < 0
        earlier = batch.sampled[(-1 - batch.token_ids).clamp(min=0)]
        token_ids = torch.where(late, earlier, batch.token_ids)
        seen = torch.zeros(len(batch.token_ids), dtype=torch.int64)
        for layer, group in enumerate(batch.groups):
            cache = batch.kv_cache[layer].flatten(1, 2)  # [2, num_slots, 1, 1]
            cache[0, group.slots, 0, 0] = token_ids + 1
            cache[1, group.slots, 0, 0] = batch.positions + 1
            seen = (seen * 31 + self._read(batch, group, batch.kv_cache[layer])) % PRIME
        seen = seen[batch.output_rows]
        factors = torch.arange(1, VOCAB + 1) * 7919 + 104729
        mixed = (seen[:, None] * factors) % PRIME
        mixed = (mixed ^ (mixed >> 7)) * 48271 % PRIME
        return (mixed.double() / PRIME * 8).float()

    def _read(self, batch: Batch, group: KVGroup, cache: Tensor) -> Tensor:  # [num_tokens]
        hashes = []
        block_size = cache.shape[2]
        starts = batch.query_start.tolist()
        for s, length in enumerate(batch.seq_lens.tolist()):
            for row in range(starts[s], starts[s + 1]):
                position = length - (starts[s + 1] - row)
                assert position == batch.positions[row]
                first = max(0, position - group.window + 1) if group.window else 0
                visible = torch.arange(first, position + 1)
                pages = group.block_table[s][visible // block_size].long()
                assert (pages >= 0).all(), "a query sees a page that was given back"
                tokens, positions = cache[:, pages, visible % block_size, 0, 0]
                hashes.append((tokens * (positions * 7907 % 65537 + 1)).sum() % PRIME)
        return torch.stack(hashes)


def pages_to_bytes(num_pages: int, block_size: int) -> int:
    """kv_cache_memory for two groups with this many pages each."""
    return 2 * num_pages * block_size * TOKEN_BYTES


def toy_engine(model: ToyModel | None = None, *, overlap: bool = False, **config: Any) -> Engine:
    """overlap: read tokens one step late, as on a GPU."""
    config = {"block_size": 4, "kv_cache_memory": 1 << 20} | config
    engine = Engine(EngineConfig(**config), model=model or ToyModel())
    engine.overlap = overlap
    return engine


def make_toy_engine(config: EngineConfig, progress: Any) -> Engine:
    """For the engine process; config.model's name chooses what goes wrong."""
    progress(1, 2)
    model = ToyModel(max_positions=100_000)
    if config.model == Path("breaks"):
        model.forward = lambda batch: 1 // 0  # type: ignore[assignment]
    return Engine(config, model=model)


def add_request(request_id: str, prompt: list[int], **params: Any) -> AddRequest:
    adapter = params.pop("adapter", None)
    params = {"max_tokens": 8, "temperature": 0.0} | params
    return AddRequest(request_id, prompt, SamplingParams(**params), 0.0, adapter)


def run(engine: Engine, *requests: AddRequest) -> dict[str, list[RequestOutput]]:
    """All outputs of requests that arrive at once, and a check that nothing is left behind."""
    outputs: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check()
    assert engine.cache.usage == 0
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    assert outputs[-1].finish_reason in ("stop", "length"), outputs[-1]
    return [token for output in outputs for token in output.token_ids]
