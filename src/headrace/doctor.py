"""What this machine can run: devices, memory, and which models fit."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from headrace.engine.cache_size import available_memory

GIB = 2**30


@dataclass(frozen=True)
class KnownModel:
    """Sizes of a model."""

    name: str
    num_params: float
    mxfp4_bytes: float  # as in the checkpoint: experts in MXFP4, the rest bf16
    # 2 (k, v) * layers * KV heads * head_dim of full attention; windowed layers hold 128 tokens
    kv_values_per_token: int


KNOWN_MODELS = (
    KnownModel("bundled", 11.5e6, 9.2e6, 2 * 3 * 2 * 32),
    KnownModel("gpt-oss-20b", 20.9e9, 12.8 * GIB, 2 * 12 * 8 * 64),
    KnownModel("gpt-oss-120b", 116.8e9, 60.8 * GIB, 2 * 18 * 8 * 64),
)


def run_doctor(console: Console) -> None:
    """Print two tables: the machine, and the models that fit it."""
    console.print(_machine_table())
    console.print(_model_table())


def _machine_table() -> Table:
    table = Table("Part", "Found", title="This machine")
    table.add_row("Python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("triton", _version("triton"))
    table.add_row("CPU", f"{os.cpu_count()} cores, {available_memory() / GIB:.1f} GiB free")
    if not torch.cuda.is_available():
        table.add_row("GPU", "none: the CPU backend is used")
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        table.add_row(
            f"GPU {i}",
            f"{props.name}, sm_{props.major}{props.minor}, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
        )
    return table


def _model_table() -> Table:
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info(0)[0] if on_gpu else available_memory()
    table = Table("Model", "Needs", "Fits", "Room for KV cache", title="Models")
    for model in KNOWN_MODELS:
        # the CPU backend has weights and cache in float32, the GPU its cache in bfloat16
        need = model.mxfp4_bytes if on_gpu else model.num_params * 4
        left = free - need
        kv_bytes = model.kv_values_per_token * (2 if on_gpu else 4)
        room = f"{left / kv_bytes:,.0f} tokens" if left > 0 else ""
        table.add_row(model.name, f"{need / GIB:.1f} GiB", "yes" if left > 0 else "no", room)
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
