"""Compile a model's Triton kernels before anybody waits for them, many at once.

Compiled kernels are kept on disk by Triton, so the next start finds them there. Processes compile
them, and a pool of threads waits for these and loads the kernels.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from headrace.config import ConfigError
from headrace.engine.compilers import Compilers, counted_compiles


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did."""

    num_kernels: int
    num_compiled: int  # the others were found on disk

    def __add__(self, other: WarmUp) -> WarmUp:
        return WarmUp(self.num_kernels + other.num_kernels, self.num_compiled + other.num_compiled)


def warm_up(
    dry_run: Callable[[], object], device: torch.device, compilers: Compilers | None = None
) -> WarmUp:
    """Compile and load every Triton kernel that dry_run launches; none of them runs.

    Without compilers the threads of this process compile.

    All else in dry_run runs as it is, on tensors that no kernel has written: it must not take
    sizes or indices from them. Raises ConfigError if the disk can't hold what is compiled.
    """
    keep_launchers_apart()
    on_gpu = device.type == "cuda"
    index = torch.cuda.current_device() if on_gpu and device.index is None else device.index

    def use_device() -> None:  # each thread has a current device of its own
        if on_gpu:
            torch.cuda.set_device(index)

    try:
        with (
            ThreadPoolExecutor(os.cpu_count(), initializer=use_device) as pool,
            counted_compiles() as compiled,
        ):
            compiling = _compile_mode(pool, compilers or Compilers(0), compiled)
            with nothing_launched(), nothing_collected(), compiling:
                dry_run()
    except OSError as error:
        raise ConfigError(
            f"compiled kernels can't be kept, set TRITON_CACHE_DIR: {error}"
        ) from None
    return WarmUp(len(compiling.future_kernels), sum(compiled))


def _compile_mode(pool: ThreadPoolExecutor, compilers: Compilers, compiled: list[bool]) -> Any:
    """While it is entered, kernels are compiled by the compilers, and loaded in the pool."""
    from triton import AsyncCompileMode

    def load(key: str, compile_kernel: Any) -> Any:
        compiled.append(compilers.compile(key, compile_kernel))
        kernel = compile_kernel()  # finds it on disk
        _ = kernel.run  # loads it; the first time it runs a C compiler, too
        return kernel

    class CompileMode(AsyncCompileMode):
        def submit(self, key: str, compile_kernel: Any, finish: Any) -> Any:
            """Put the kernel in its cache at once, though it isn't one yet.

            The layers of a model launch the same kernels; without this each launch would work out
            the kernel's key on disk, ten times as long as the rest of it.
            """
            future = super().submit(key, partial(load, key, compile_kernel), finish)
            finish(future)
            return future

    return CompileMode(pool)


@cache
def keep_launchers_apart() -> None:
    """Let threads load launchers at once; from now on, in the whole process.

    A launcher is a C module, and Triton gives all of them one name. Python keeps such modules by
    name: a second load of a file puts its functions into whichever module has the name by then.
    Between the load of a launcher and the look at its function, another thread could thus have
    put another launcher's function there. Here each file has a name of its own.
    """
    from triton.runtime import build

    load = build._load_module_from_path

    def load_by_own_name(name: str, path: str) -> ModuleType:
        # Python calls the PyInit_ of what follows the last dot; the folder's name is a hash
        return load(f"{Path(path).parent.name}.{name}", path)

    build._load_module_from_path = load_by_own_name


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Every launch of a Triton kernel by this thread compiles it, and ends there."""
    from triton.runtime.jit import JITFunction

    run, thread = JITFunction.run, threading.get_ident()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        ends_there = warmup or threading.get_ident() == thread
        return run(self, *args, grid=grid, warmup=ends_there, **kwargs)

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


@contextmanager
def nothing_collected() -> Iterator[None]:
    """No garbage collection, in which finalizers may let another thread go on.

    Where that happens in the midst of ast.parse, which Triton calls for every kernel, Python
    before 3.12.1 raises a SystemError in another thread's. Compiling leaves 0.1 GB of garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
