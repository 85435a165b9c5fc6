"""Kernels compiled by other processes, for an H100 that isn't there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fake_gpu import run_script

KERNELS = """
import triton
import triton.language as tl

TWO: tl.constexpr = tl.constexpr(2)

@triton.jit
def twice(x):
    return x * TWO

@triton.jit
def first_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, twice(tl.load(x_ptr + i)))

@triton.jit
def second_kernel(x_ptr, BLOCK: tl.constexpr, WIDTHS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, twice(tl.load(x_ptr + i)) + WIDTHS[1])

@triton.jit
def wrong_kernel(x_ptr):
    tl.store(x_ptr, no_such_name)
"""
SCRIPT = """
import json, os, signal, sys
import torch
from triton.compiler.compiler import ASTSource
from headrace.engine import compilers as module
from headrace.engine.compilers import Compilers
from headrace.engine.warmup import warm_up
from tests.fake_gpu import install

gpu = install()
x = torch.ones(128)
what = sys.argv[1]
with Compilers(2) as compilers:
    import kernels  # as ops do, with the first launch
    if what == "compile":  # only the others may
        ASTSource.make_ir = None
    module.PATIENCE = 0.3 if what == "SIGSTOP" else 60
    if what.startswith("SIG"):
        for pid in compilers._processes:
            os.kill(pid, signal.Signals[what])

    def dry_run():
        for block in (16, 32, 64):
            kernels.first_kernel[(1,)](x, BLOCK=block)
            kernels.second_kernel[(1,)](x, BLOCK=block, WIDTHS=(0, block))
        if what == "fail":
            kernels.wrong_kernel[(1,)](x)

    done = warm_up(dry_run, torch.device("cpu"), compilers)
print(json.dumps([done.num_kernels, done.num_compiled, len(gpu.loaded)]))
try:
    os.wait()
except ChildProcessError:
    print("nobody is left")
"""


def run(what: str, folder: Path) -> tuple[list[int], str]:
    """Numbers of kernels, compiled and loaded; what was said on stderr."""
    pytest.importorskip("triton")
    (folder / "kernels.py").write_text(KERNELS)
    process = run_script(f"import sys; sys.argv = ['', '{what}']\n" + SCRIPT, folder)
    if process.returncode:
        return [], process.stderr
    counts, nobody = process.stdout.splitlines()
    assert nobody == "nobody is left"
    return json.loads(counts), process.stderr


def test_they_compile_and_the_caller_loads(tmp_path: Path) -> None:
    """Under the caller's keys: a start later, too, finds all on disk."""
    assert run("compile", tmp_path) == ([6, 6, 6], "")
    assert run("compile", tmp_path) == ([6, 0, 6], "")


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_if_they_die_or_hang_the_caller_compiles(tmp_path: Path, signal: str) -> None:
    assert run(signal, tmp_path) == ([6, 6, 6], "")


def test_a_kernel_that_does_not_compile_is_the_callers_error(tmp_path: Path) -> None:
    counts, told = run("fail", tmp_path)
    assert not counts
    assert "CompilationError" in told
    assert "no_such_name" in told
