"""Memory that adapters give back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headrace.lora.adapter import Adapter
from headrace.lora.factors import Factors
from headrace.lora.loader import Loader
from headrace.lora.memory import LoraMemory
from headrace.lora.peft_config import parse_peft_config
from headrace.lora.targets import Site, Target

SITES = tuple(Site((Target(str(i), 1, 1),)) for i in range(7))


def test_what_is_dropped_leaves_memory_and_a_file_stays(tmp_path: Path) -> None:
    loader = Loader(LoraMemory(SITES, 1, 1, 0, torch.float32, torch.device("cpu")), lambda name: a)
    a, b = torch.ones(2, 64, 512), torch.ones(512, 64, 2).permute(2, 1, 0)
    save_file({"a": a}, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        mapped = file.get_tensor("a")
    config = parse_peft_config({"peft_type": "LORA", "r": 64})
    factors = {"owned": Factors(a.clone(), b.clone(), 1.0), "mapped": Factors(mapped, b, 1.0)}
    neighbours = [torch.ones(2, 64, 512) for _ in range(8)]
    adapter = Adapter(tmp_path, config, factors, ())
    copy = loader.keep(adapter).result()
    loader.drop(adapter)
    loader._loading.submit(lambda: None).result()
    for tensor in (factors["owned"].a, factors["owned"].b):
        assert (tensor == 0).float().mean() > 0.9  # all of it but the ends, in pages of others
    assert torch.equal(mapped, a)
    assert all(torch.equal(tensor, a) for tensor in neighbours)
    for kept in copy.factors.values():
        assert kept.a.min() == kept.b.min() == 1
        assert kept.b.stride() == b.stride()
