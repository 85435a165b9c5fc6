from __future__ import annotations

import ast
import gc
import inspect
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from headrace.engine.warmup import nothing_collected
from tests.fake_gpu import run_script

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * factor, mask=i < n)
"""
SCRIPT = """
import json, threading
import torch
from headrace.engine.warmup import warm_up
from kernels import scale_kernel
from tests.fake_gpu import install

gpu = install()
x = torch.ones(100)

def step():
    for block in (16, 32, 64):
        for dtype in (torch.float32, torch.float16):
            scale_kernel[(7,)](x.to(dtype), x.clone(), 2.0, 100, BLOCK=block)

def another():
    scale_kernel[(7,)](x.double(), x.clone(), 2.0, 100, BLOCK=16)

def dry_run():
    step()
    step()
    thread = threading.Thread(target=another)
    thread.start()
    thread.join()

done = warm_up(dry_run, torch.device("cpu"))
counts = [[len(gpu.loaded), len(gpu.launched)]]
step()
counts.append([len(gpu.loaded), len(gpu.launched)])
print(json.dumps({"kernels": done.num_kernels, "compiled": done.num_compiled, "counts": counts}))
"""

LAUNCHERS = """
import sys, threading
from triton.runtime.build import compile_module_from_src
from headrace.engine.warmup import keep_launchers_apart

MODULE = '''
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, 0}, {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "__triton_launcher", 0, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&definition); }
'''
wrong = []

def load(number):
    for _ in range(300):
        module = compile_module_from_src(MODULE % number, "__triton_launcher")
        wrong.extend([number] * (module.launch() != number))

keep_launchers_apart()
sys.setswitchinterval(1e-6)
for number in range(8):
    compile_module_from_src(MODULE % number, "__triton_launcher")
threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, f"{len(wrong)} of 2400 times another's"
"""


def test_threads_that_load_launchers_get_their_own(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    process = run_script(LAUNCHERS, tmp_path)
    assert process.returncode == 0, process.stderr


def test_each_kernel_is_compiled_and_loaded_once_and_kept_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "kernels.py").write_text(KERNELS)
    for num_compiled in (7, 0):
        process = run_script(SCRIPT, tmp_path)
        assert process.returncode == 0, process.stderr
        told = json.loads(process.stdout)
        assert told["kernels"] == 6  # the seventh is the other thread's, whose launch goes on
        assert told["compiled"] == num_compiled
        assert told["counts"][0] == [7, 1]
        assert told["counts"][1] == [7, 1 + 6]  # launches afterwards have nothing to wait for


def test_sources_are_parsed_in_threads_without_collections() -> None:
    """Before Python 3.12.1 this raised a SystemError where collections ran."""
    source = inspect.getsource(ast)

    def yields(phase: str, info: object) -> None:
        time.sleep(1e-4)

    gc.callbacks.append(yields)
    try:
        with nothing_collected(), ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(ast.parse, 8 * [source]))) == 8
    finally:
        gc.callbacks.remove(yields)
    assert gc.isenabled()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "kernels.py").write_text(KERNELS)
    (tmp_path / "file").write_text("")
    process = run_script(SCRIPT, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert "ConfigError: compiled kernels can't be kept" in process.stderr


@pytest.mark.gpu
def test_launches_after_the_warm_up_compile_nothing_and_compute() -> None:
    from headrace.engine.warmup import counted_compiles, warm_up
    from headrace.ops.norm import rms_norm
    from headrace.ops.norm_kernel import rms_norm_kernel

    rms_norm_kernel.device_caches.clear()  # other tests of this process have launched it
    device = torch.device("cuda")
    x = torch.randn(5, 2880, device=device).bfloat16()
    weight = torch.ones(2880, device=device).bfloat16()
    out = torch.full_like(x, 77)
    done = warm_up(lambda: rms_norm(x, weight, 1e-5, out=out), device)
    torch.cuda.synchronize()
    assert done.num_kernels == 1
    assert (out == 77).all()
    with counted_compiles() as compiled:
        rms_norm(x, weight, 1e-5, out=out)
    assert not compiled
    expected = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(out.float(), expected, atol=0.05)
