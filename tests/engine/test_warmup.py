"""Triton compiles for a GPU that isn't there: a driver of our own says which, and counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * factor, mask=i < n)
"""
SCRIPT = """
import json
import threading
import torch
import triton
from triton.backends.compiler import GPUTarget
from headrace.engine.warmup import warm_up
from kernels import scale_kernel

events = []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, kernel, shared, device):
        events.append("load")
        return "module", "function", 32, 0, 1024

class Driver:
    utils = Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        return lambda *args: events.append("launch")

triton.runtime.driver.set_active(Driver())
x = torch.ones(100)

def step():
    for block in (16, 32, 64):
        for dtype in (torch.float32, torch.float16):
            scale_kernel[(7,)](x.to(dtype), x.clone(), 2.0, 100, BLOCK=block)

def layers():
    step()
    step()
    other = threading.Thread(target=another)
    other.start()
    other.join()

def another():  # a thread that isn't warmed up
    scale_kernel[(7,)](x.double(), x.clone(), 2.0, 100, BLOCK=16)
    events[:] = [e for e in events if e != "load"]

done = warm_up(layers, torch.device("cpu"))
after_warm_up = list(events)
step()
print(json.dumps({"done": [done.num_kernels, done.num_compiled], "warm": after_warm_up,
                  "all": events}))
"""


def run_script(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Without the interpreter's switch, which is read when Triton is imported."""
    (folder / "kernels.py").write_text(KERNELS)
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2] / "src")])
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=clean | {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": path} | env,
    )


def test_each_kernel_is_compiled_and_loaded_once_and_kept_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for num_compiled in (6, 0):
        process = run_script(tmp_path)
        assert process.returncode == 0, process.stderr
        told = json.loads(process.stdout)
        assert told["done"][0] == 6
        assert told["done"][1] in (num_compiled, num_compiled + 1)  # with the other thread's
        # nothing ran but what another thread launched
        assert told["warm"] == ["launch"] + ["load"] * 6
        assert told["all"] == told["warm"] + ["launch"] * 6  # a launch afterwards compiles nothing


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "file").write_text("")
    process = run_script(tmp_path, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert "ConfigError: compiled kernels can't be kept" in process.stderr


@pytest.mark.gpu
def test_launches_after_the_warm_up_compile_nothing_and_compute() -> None:
    from headrace.engine.warmup import counted_compiles, warm_up
    from headrace.ops.norm import rms_norm

    device = torch.device("cuda")
    x = torch.randn(5, 2880, device=device).bfloat16()
    weight = torch.ones(2880, device=device).bfloat16()
    out = torch.full_like(x, 77)
    done = warm_up(lambda: rms_norm(x, weight, 1e-5, out=out), device)
    torch.cuda.synchronize()
    assert done.num_kernels >= 1
    assert (out == 77).all()
    with counted_compiles() as compiled:
        rms_norm(x, weight, 1e-5, out=out)
    assert not compiled
    expected = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(out.float(), expected, atol=0.05)
