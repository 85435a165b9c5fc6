"""Every kernel that a server of gpt-oss-20b launches compiles for an H100, and fits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.bench.profile import LAST_OP, OPS_OF_LAYER
from headrace.bench.timeline import Busy, name_ops
from tests.fake_gpu import SHARED_MEMORY, run_script

SCRIPT = """
import json, re, subprocess
from pathlib import Path
import torch, triton
from triton.compiler.compiler import CompiledKernel
from headrace.config import EngineConfig
from headrace.engine.runner import Runner
from headrace.engine.sampler import Sampler
from headrace.engine.scheduler import MAX_SCORED_ROWS
from headrace.engine.warmup import warm_up
from tests import fake_gpu
from tests.hollow import narrow_20b

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
gpu = fake_gpu.install()
model, cpu = narrow_20b(), torch.device("cpu")
fake_gpu.pretend_cuda()
engine = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048)
model.reserve(2048, 64 + MAX_SCORED_ROWS)
runner = Runner(model, [2, 2], engine, 4096)
sampler = Sampler(model.config.vocab_size, 64, cpu)
kernels, launched = [], []

def note(kernel):
    if kernel.module is None:
        cubin = next(p for p in kernel.metadata_group.values() if p.endswith(".cubin"))
        command = [CUOBJDUMP, "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
        names = kernel.src.fn.arg_names
        constants = {names[i[0]]: str(value) for i, value in kernel.src.constants.items()}
        kernels.append({
            "name": kernel.name,
            "constants": constants,
            "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
            "registers": int(re.search(r"REG:(\\d+)", usage)[1]),
            "shared": kernel.metadata.shared,
            "products": sorted(set(re.findall(r"wgmma|mma\\.sync", kernel.asm["ptx"]))),
        })
        kernel.module = "loaded"
        kernel._run = lambda *args: launched.append(kernel.name)

CompiledKernel._init_handles = note

def dry_run():
    runner.dry_run()
    sampler.dry_run()

warm_up(dry_run, cpu)
assert not launched
with torch.inference_mode():
    model.forward(runner._idle_decode(4, False))
print(json.dumps([kernels, launched]))
"""


def test_every_kernel_of_a_step_compiles_and_fits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    process = run_script(SCRIPT, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    kernels, launched = json.loads(process.stdout.splitlines()[-1])
    names = {kernel["name"] for kernel in kernels}
    assert {"linear_kernel", "grouped_matmul_kernel", "attention_kernel"} <= names
    assert len(kernels) > 20
    assert [k for k in kernels if k["shared"] > SHARED_MEMORY] == []
    spilling = {kernel["name"] for kernel in kernels if kernel["stack"] > 0}
    assert spilling <= {"cos_sin_kernel", "attention_kernel"}  # angles beyond 100,000 need a stack
    # Of prompts and of single rows, with a window and without, whose prompts spill seven words for
    # four programs on an SM: faster than three with all in registers.
    stacks = sorted(kernel["stack"] for kernel in kernels if kernel["name"] == "attention_kernel")
    assert stacks[:3] == [0, 0, 0]
    assert stacks[3] <= 32
    named = name_ops([Busy(name, 1.0) for name in launched], OPS_OF_LAYER, 2, LAST_OP)
    ops = [kernel.name.split()[1] for kernel in named if " " in kernel.name]
    layer = ["qkv", "attention", "output", "router", "gate_up", "down"]
    assert ops == [*layer, *layer, "lm_head"]  # as `headrace profile` tells them apart
    # One kind of matrix instruction each, whatever the batch: its bits would be others. But where
    # prompts sum their probabilities, an H100's mma.sync gives the bits of its wgmma.
    products = {(kernel["name"], *kernel["products"]) for kernel in kernels if kernel["products"]}
    assert products == {
        ("attention_kernel", "mma.sync", "wgmma"),
        ("attention_kernel", "wgmma"),
        ("grouped_matmul_kernel", "wgmma"),
        ("linear_kernel", "wgmma"),
        ("router_kernel", "wgmma"),
    }
