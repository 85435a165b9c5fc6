"""The dry run of a server's warm-up: no step after it launches a kernel that it didn't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fake_gpu import run_script

# Widths are those of gpt-oss-20b, on which the choice of kernels depends; fewer words and narrower
# experts take less memory, and lead to the same kernels. None is compiled.
SCRIPT = """
import json, random, sys
from dataclasses import replace
import numpy as np
import torch
from triton.runtime.jit import JITFunction
from headrace.bench.synth import SIZES
from headrace.config import EngineConfig
from headrace.engine.flat_rows import FlatRows
from headrace.engine.graphs import chunk_sizes
from headrace.engine.runner import Runner
from headrace.engine.scheduler import MAX_SCORED_ROWS
from headrace.lora.memory import LoraMemory
from headrace.lora.targets import model_sites
from headrace.models.config import parse_config
from headrace.models.gpt_oss import GptOss
from headrace.models.gpt_oss_weights import read_gpt_oss, tensor_shapes
from tests import fake_gpu
from tests.hollow import Zeros, one_layer_of_each_kind

SEQS, TOKENS, RANK = 100, 2048, 64
fake_gpu.install()
config = replace(one_layer_of_each_kind(parse_config(SIZES["20b"])), vocab_size=20480,
                 intermediate_size=192)
cpu = torch.device("cpu")
zeros = Zeros(tensor_shapes(config, True), cpu)
model = GptOss(config, read_gpt_oss(config, zeros, True, torch.bfloat16, gpu_layout=True))
fake_gpu.pretend_cuda()
model.reserve(TOKENS, SEQS + MAX_SCORED_ROWS, RANK)
adapters = LoraMemory(model_sites(config), 3, RANK, 1 << 20, torch.bfloat16, cpu)
engine = EngineConfig(max_num_seqs=SEQS, max_num_batched_tokens=TOKENS)
runner = Runner(model, [2, 2], engine, 131072, adapters.weights)
kernels = {}

def note(self, key, *args):
    kernels.setdefault(self.__name__, set()).add(key)

JITFunction._do_compile = note
runner.dry_run()
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
        lora = runner._idle_lora(rows, chosen.random() < 0.6)
        model.forward(runner._batch(rows, lora=lora))
    for size in chunk_sizes(TOKENS):
        model.forward(runner._idle_chunk(size, chosen.random() < 0.6))
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
