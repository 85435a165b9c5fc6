"""Processes that compile Triton's kernels for one that has other things to do.

A third of a compile is Python: threads that compile wait for each other, and let whoever reads the
weights wait. The processes are forked, so they need not import anything, and a start that finds
all kernels on disk has lost a few milliseconds.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, Self

import torch

MAX_PROCESSES = 8  # of up to 0.4 GB each
PATIENCE = 120.0  # seconds; the longest compile takes 5 on an idle core


def num_compilers(device: str) -> int:
    """How many processes --device is worth: a core each, none without a GPU."""
    # device_count leaves CUDA as it is, which must not be in use before a fork
    on_gpu = device != "cpu" and torch.cuda.device_count() > 0
    return min(os.cpu_count() or 1, MAX_PROCESSES) if on_gpu else 0


class Compilers:
    """So many processes, forked at once, which end with the block or with this process.

    Make them before CUDA is used, and before there are threads.
    """

    def __init__(self, number: int) -> None:
        if number:
            from triton.runtime.jit import JITFunction  # not to be imported by each of them

            ForkingPickler.register(JITFunction, _name_of_kernel)
        self._processes: dict[int, Connection] = {}
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for _ in range(number):
            ours, theirs = Pipe()
            if not (pid := os.fork()):
                _compile_until_end(theirs)
            theirs.close()
            self._processes[pid] = ours
            self._idle.put(ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid, connection in self._processes.items():
            connection.close()
            os.kill(pid, signal.SIGKILL)  # it may hang: a fork takes other threads' locks along
            os.waitpid(pid, 0)

    def compile(self, key: str, compile_kernel: Callable[[], Any]) -> bool:
        """Have compiled to disk what Triton's own function would; False if it was there.

        False, too, if it isn't there even now, for whatever reason: the function itself will say
        why. Any thread may call this.
        """
        if not self._processes:
            return False
        job = inspect.getclosurevars(compile_kernel).nonlocals
        process = self._idle.get()
        try:
            process.send((key, job["src"], job["target"], job["options"].__dict__, job["env_vars"]))
            if not process.poll(PATIENCE):
                process.close()
                return False
            compiled: bool = process.recv()
        except (EOFError, OSError):  # the process is gone, or was given up
            return False
        finally:
            self._idle.put(process)
        return compiled


@contextmanager
def counted_compiles() -> Iterator[list[bool]]:
    """A list that grows by one for each kernel made ready: whether it had to be compiled."""
    from triton import knobs

    compiled: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        compiled.append(not cache_hit)

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield compiled
    finally:
        knobs.compilation.listener = before


def _compile_until_end(connection: Connection) -> None:
    """The life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: it ends with its caller
    try:
        # all else that was open; with the other ends of the pipes it would not see its caller end
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        while True:
            connection.send(_compile(*connection.recv()))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _compile(key: str, src: Any, target: Any, options: dict[str, Any], env: dict[str, str]) -> bool:
    from triton.compiler import compiler

    # the caller's key: it depends on the order in which a process sees its kernels
    compiler.get_cache_key = lambda *args, **kwargs: key
    with counted_compiles() as compiled:
        try:
            compiler.compile(src, target, options, _env_vars=env)
        except Exception:
            return False
    return compiled[-1]


def _name_of_kernel(kernel: Any) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
    """How a kernel travels."""
    return _kernel_of_name, (kernel.__module__, kernel.__name__)


def _kernel_of_name(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
