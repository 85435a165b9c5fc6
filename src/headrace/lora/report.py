"""What `headrace lora check` says of an adapter."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from headrace.config import ConfigError
from headrace.files import BUNDLED_MODEL
from headrace.lora.adapter import Adapter, config_fields, read_adapter
from headrace.lora.check import check_adapter
from headrace.lora.factors import Factors
from headrace.lora.memory import LoraMemory, sizes_of
from headrace.lora.targets import model_sites
from headrace.models.config import read_config
from headrace.models.weights import Checkpoint

BUNDLED_NAME = "headrace/tiny"
BYTES = 2  # of an element on the device: bfloat16


def report(console: Console, path: Path, model_dir: Path, max_rank: int) -> None:
    """Read an adapter as a server of this model would, try it, and print what it changes.

    Raises ConfigError with the reasons if it would not load.
    """
    sites = model_sites(read_config(model_dir))
    targets = [target for site in sites for target in site.targets]
    adapter = read_adapter(path, targets, lambda name: base_tensor(model_dir, name), max_rank)
    sizes = sizes_of(adapter.factors)
    memory = LoraMemory(
        sites, 1, adapter.max_rank, sum(sizes.values()), torch.float32, torch.device("cpu")
    )
    placement = memory.place(sizes)
    assert placement is not None, sizes
    memory.write(placement, adapter.factors)
    memory.publish(0, placement, adapter.factors)
    checked = check_adapter(memory.weights, sites, 0, adapter)
    console.print(_table(adapter, [target.key for target in targets]))
    num_bytes = sum(sizes.values()) * BYTES
    for line in (
        f"largest rank {adapter.max_rank}, {num_bytes / 1e6:.1f} MB on the device in bfloat16",
        checked,
        *(f"warning: {warning}" for warning in adapter.warnings),
        f"{path} loads beside {model_dir}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def find_model(path: Path) -> Path:
    """The base model that an adapter names: a directory here, or the bundled one."""
    name = str(config_fields(path).get("base_model_name_or_path") or "")
    if name == BUNDLED_NAME:
        return BUNDLED_MODEL
    if not os.path.isfile(Path(name) / "config.json"):  # Path.is_file raises for some names
        raise ConfigError(f"{path} was made for {name or 'an unnamed model'}: give --model DIR")
    return Path(name)


def base_tensor(model_dir: Path, name: str) -> Tensor:
    """A tensor of the checkpoint; tied models keep the LM head under the embedding's name."""
    checkpoint = Checkpoint(model_dir)
    if name not in checkpoint:
        name = "model.embed_tokens.weight"
    if name not in checkpoint:
        raise ConfigError(f"{model_dir} has no tensor {name}")
    return checkpoint.read(name)


def _table(adapter: Adapter, keys: list[str]) -> Table:
    """A row for the targets of each kind, in the model's order."""
    kinds: dict[str, list[Factors]] = defaultdict(list)
    for key in filter(adapter.factors.__contains__, keys):
        kinds[re.sub(r"^model\.(layers\.\d+\.)?", "", key)].append(adapter.factors[key])
    table = Table("Target", "Count", "Rank", "Scale", "in -> out", "dtype", title=str(adapter.path))
    for kind, found in kinds.items():
        first = found[0]
        experts = f"{len(first.a)} x " if len(first.a) > 1 else ""
        table.add_row(
            kind,
            str(len(found)),
            _span([f.rank for f in found]),
            _span([f.scale for f in found]),
            f"{experts}{first.a.shape[2]} -> {first.b.shape[2]}",
            str(first.a.dtype).removeprefix("torch."),
        )
    return table


def _span(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
