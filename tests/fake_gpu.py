"""An H100 that isn't there: Triton compiles for it, and what is loaded and launched is noted.

For a process of its own, without TRITON_INTERPRET, which Triton reads when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = 232448  # bytes a program can have
NUM_SMS = 132


class FakeDriver:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        self.loaded: list[str] = []  # kernel names
        self.launched: list[str] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        memory = {"mem_clock_rate": 2619000, "mem_bus_width": 5120}
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": NUM_SMS, **memory}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.loaded.append(name)
        return "module", "function", 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: self.launched.append(source.name)


def install() -> FakeDriver:
    """Make Triton use it."""
    import triton

    driver = FakeDriver()
    triton.runtime.driver.set_active(driver)
    return driver


def pretend_cuda() -> None:
    """Make the ops take the host's tensors for this GPU's; all kernels are Triton's."""
    import torch

    from headrace.ops import cuda_source

    cuda_source.available = lambda: False  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment, method-assign]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    properties = MagicMock(
        multi_processor_count=NUM_SMS, shared_memory_per_block_optin=SHARED_MEMORY
    )
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment]
    torch.cuda.Event = MagicMock  # type: ignore[assignment, misc]


def run_script(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python text in a process of its own; its kernels are kept in folder / cache."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "src")])
    cache = {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": path}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, env=clean | cache | env, cwd=folder
    )
