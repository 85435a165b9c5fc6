"""The dry run of a server's warm-up: no step after it launches a kernel that it didn't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fake_gpu import run_script

# None of the kernels is compiled.
SCRIPT = """
import json, random, sys
from dataclasses import replace
import numpy as np
import torch
from triton.runtime.jit import JITFunction
from headrace.config import EngineConfig
from headrace.engine.flat_rows import FlatRows
from headrace.engine.graphs import chunk_sizes
from headrace.engine.runner import NO_ADAPTER, Runner
from headrace.engine.scheduler import MAX_SCORED_ROWS
from headrace.lora.memory import LoraMemory
from headrace.lora.targets import model_sites
from tests import fake_gpu
from tests.hollow import narrow_20b

SEQS, TOKENS, RANK = 100, 2048, 64
fake_gpu.install()
model, cpu = narrow_20b(num_layers=5), torch.device("cpu")
fake_gpu.pretend_cuda()
model.reserve(TOKENS, SEQS + MAX_SCORED_ROWS, RANK)
adapters = LoraMemory(model_sites(model.config), 3, RANK, 1 << 20, torch.bfloat16, cpu)
engine = EngineConfig(max_num_seqs=SEQS, max_num_batched_tokens=TOKENS)
small = Runner(model, [2, 2], engine, 1, adapters.weights)  # as while the weights are read
runner = Runner(model, [1001, 300], engine, 131072, adapters.weights)
kernels = {}

def note(self, key, *args):
    kernels.setdefault(self.__name__, set()).add(key)

JITFunction._do_compile = note
small.dry_run()
counts = [{name: len(keys) for name, keys in kernels.items()}]
chosen = random.Random(0)
with torch.inference_mode():
    for _ in range(150):
        n = int(TOKENS ** chosen.random())
        seqs = chosen.choice([1, chosen.randint(1, min(n, SEQS))])
        each = n // seqs
        n = seqs * each
        outputs = min(n, chosen.choice([0, 1, 2, SEQS, chosen.randint(0, SEQS + MAX_SCORED_ROWS)]))
        idle = FlatRows.idle(seqs, each, 2, -(-each // 16))
        rows = replace(idle, output_rows=np.arange(outputs))
        slots = NO_ADAPTER if chosen.random() < 0.6 else None
        model.forward(runner._batch(rows, slots))
    for has_lora in (False, True):
        for size in chunk_sizes(TOKENS, has_lora):
            model.forward(runner._idle_chunk(size, has_lora))
counts.append({name: len(keys) for name, keys in kernels.items()})
print(json.dumps(counts))
"""


def test_steps_launch_what_the_dry_run_did(tmp_path: Path) -> None:
    """Any number of tokens and of outputs, with adapters and without."""
    pytest.importorskip("triton")
    process = run_script(SCRIPT, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    dry, later = json.loads(process.stdout.splitlines()[-1])
    assert later == dry
    assert dry["linear_kernel"] > 10
    assert dry["shrink_kernel"] > 10
