"""A model with adapters in its slots, to drive its forward without the engine's pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headrace.lora.adapter import Adapter, read_adapter
from headrace.lora.memory import LoraMemory, sizes_of
from headrace.lora.rows import row_arrays
from headrace.lora.targets import model_sites
from headrace.models import Batch, Model
from headrace.ops.lora import LoraBatch, LoraRows

NUM_SLOTS = 5


def base_tensor(model: Model, name: str) -> Tensor:
    """The base weights that PEFT may save with an adapter."""
    weights = model.weights  # type: ignore[attr-defined]
    tensors = {"model.embed_tokens.weight": weights.embedding, "lm_head.weight": weights.lm_head}
    return tensors[name]


def read(model: Model, path: Path, max_rank: int = 64) -> Adapter:
    targets = [t for site in model_sites(model.config) for t in site.targets]
    return read_adapter(path, targets, lambda name: base_tensor(model, name), max_rank)


class AdaptedModel:
    """Sequence s of every batch has the adapter at slot_of_seq[s], -1: none."""

    def __init__(self, model: Model, *adapters: Adapter) -> None:
        self.model = model
        self.config, self.kv_layout = model.config, model.kv_layout
        self.device, self.dtype = model.device, model.dtype
        sites = model_sites(model.config)
        self.memory = LoraMemory(sites, NUM_SLOTS, 64, 1 << 24, model.dtype, model.device)
        self.slot_of_seq: Sequence[int] = ()
        for slot, adapter in enumerate(adapters):
            placement = self.memory.place(sizes_of(adapter.factors))
            assert placement is not None
            self.memory.write(placement, adapter.factors)
            self.memory.publish(slot, placement, adapter.factors)

    def forward(self, batch: Batch) -> Tensor:
        counts = batch.query_start.diff().cpu().numpy()
        slots = np.repeat(np.array(self.slot_of_seq, dtype=np.int32), counts)
        outputs = slots[batch.output_rows.cpu().numpy()]
        lora = LoraBatch(self.memory.weights, self._rows(slots), self._rows(outputs))
        return self.model.forward(replace(batch, lora=lora))

    def _rows(self, slots: np.ndarray) -> LoraRows:
        arrays = row_arrays(slots, self.memory.weights.lm_head.rank.shape[1])
        return LoraRows(*(torch.from_numpy(array).to(self.device) for array in arrays))
