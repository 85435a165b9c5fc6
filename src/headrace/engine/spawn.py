"""The engine process's first function: what it imports, its parent need not."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

from headrace.config import EngineConfig
from headrace.files import read_ahead

Progress = Callable[[int, int], None]  # (done, total), while the checkpoint is read
MakeEngine = Callable[[EngineConfig, Progress], Any]  # an Engine, which is not imported here


def run(config: EngineConfig, address: str, make: MakeEngine | None) -> None:
    """`headrace.engine.process.run_engine`; without make, on the checkpoint of the config."""
    threading.Thread(target=read_ahead, args=(config.model,), daemon=True).start()
    gc.disable()  # until `settle`: imports make no garbage, and to look for it takes a tenth longer
    from headrace.engine.process import make_engine, run_engine

    run_engine(config, address, make or make_engine)
