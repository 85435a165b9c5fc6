"""The expert matmuls compiled for Hopper with every tile of the table, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fake_gpu import SHARED_MEMORY, run_script

SM_MEMORY = 228 * 1024  # bytes of an SM
RESERVED = 1024  # of them for each program, by CUDA

SCRIPT = """
import contextlib, io, json, re, subprocess
from pathlib import Path
import torch, triton
from triton.compiler.compiler import CompiledKernel
from headrace.bench import cases_lora
from headrace.ops.experts import Experts
from headrace.ops.lora import LoraBuffers, MoELora
from headrace.ops.lora_kernel import FEW_PAIRS, NUM_SLICES
from headrace.ops.moe import MoEWeights, own_buffers
from headrace.ops.moe_kernel import down_matmul, gate_up_matmul
from headrace.ops.mxfp4_kernel import PreparedMXFP4, RowOrder
from headrace.ops.tiles import Problem, choose
from tests import fake_gpu
from tests.sass import youngest_overwritten

fake_gpu.install()
fake_gpu.pretend_cuda()
HIDDEN, INTER, TOP_K = 2880, 2880, 4

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)

def weight(rows, columns, order):
    tiles = 2, -(-rows // 64), -(-columns // 128)
    words = zeros(*tiles[:2], 2 * tiles[2], 512, dtype=torch.int32)
    scales = zeros(*tiles, 64, dtype=torch.int32)
    return PreparedMXFP4(words, scales, rows, columns, order, 0)

experts = Experts(weight(2 * INTER, HIDDEN, RowOrder.INTERLEAVED), zeros(2, 2 * INTER),
                  weight(HIDDEN, INTER, RowOrder.PLAIN), zeros(2, HIDDEN))
layer = MoEWeights(zeros(HIDDEN), 1e-5, zeros(2, HIDDEN), zeros(2), experts, TOP_K)
h = zeros(16, HIDDEN)
kernels = []
triton.knobs.nvidia.dump_ptxas_log = True  # printed when a kernel is compiled
log = io.StringIO()

def disassembled(kernel):
    Path("k.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", "k.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

def note(kernel):
    if kernel.module is None:
        kernel.module = "loaded"
        kernel._run = lambda *args: None
        told = log.getvalue()
        log.seek(0)
        log.truncate()
        if kernel.name != "grouped_matmul_kernel":
            return
        names = kernel.src.fn.arg_names
        constants = {names[i[0]]: value for i, value in kernel.src.constants.items()}
        kernels.append({
            "constants": {k: v for k, v in constants.items() if isinstance(v, int | tuple)},
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            "registers": int(re.search(r"Used (\\d+) registers", told)[1]),
            "stack": int(re.search(r"(\\d+) bytes stack frame", told)[1]),
            "serialized": "serialized" in told,
            "overwritten": youngest_overwritten(disassembled(kernel)),
            "first_access": re.search(r"griddepcontrol.wait|ld.global|st.global|cp.async",
                                      kernel.asm["ptx"])[0],
            "first_write": re.search(r"griddepcontrol.wait|st.global", kernel.asm["ptx"])[0],
            "products": sorted(set(re.findall(r"wgmma|mma\\.sync", kernel.asm["ptx"]))),
        })

CompiledKernel._init_handles = note

def run(tokens, lora):
    problems = [Problem(m * TOP_K, experts, memory_tb_per_s=memory)
                for m in tokens for experts in (32, 128) for memory in (3.35, 4.8)]
    for choice in {choose(problem) for problem in problems}:
        buffers = own_buffers(len(h), layer, "cpu", choice)
        with contextlib.redirect_stdout(log):
            gate_up_matmul(layer, buffers, lora)
            down_matmul(layer, buffers, lora)

def lora(rank, num_parts):
    adapters = cases_lora.random_adapters(2, rank, torch.device("cpu"))
    pairs = zeros(num_parts, 1, len(h) * TOP_K, rank, dtype=torch.float32)
    return MoELora(adapters.layer, adapters.memory, rows, LoraBuffers(pairs=pairs))

tokens = [1 << i for i in range(14)]
run(tokens, None)
cases_lora.NUM_EXPERTS = 2
rows = cases_lora.rows_of(torch.zeros(len(h)), 2, torch.device("cpu"))
for rank in (16, 64):
    run([m for m in tokens if m * TOP_K <= FEW_PAIRS], lora(rank, 1 + NUM_SLICES))
    run([m for m in tokens if m * TOP_K > FEW_PAIRS], lora(rank, 1))
print(json.dumps(kernels))
"""


def test_every_tile_keeps_its_matrix_instructions_under_way(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    process = run_script(SCRIPT, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    kernels = json.loads(process.stdout.splitlines()[-1])
    assert len(kernels) >= 10
    with_adapters = [kernel for kernel in kernels if kernel["constants"]["LORA"]]
    assert len(with_adapters) >= 28
    for kernel in with_adapters:
        if kernel["constants"]["WIDTHS"][-1] == 16 and kernel["constants"]["BLOCK_N"] == 64:
            # five programs on an SM, so that some work while others wait for x A^T
            assert kernel["registers"] * kernel["warps"] * 32 * 5 <= 65536, kernel
            assert (kernel["shared"] + RESERVED) * 5 <= SM_MEMORY, kernel
    for kernel in kernels:
        assert not kernel["serialized"], kernel
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["products"] == ["wgmma"], kernel
        if kernel["constants"]["WIDTHS"][-1] == 128 and kernel["warps"] == 4:
            # two programs on an SM: one decodes while the other multiplies
            assert (kernel["shared"] + RESERVED) * 2 <= SM_MEMORY, kernel
        # with adapters, the last product's registers would be given away at once
        overwritten = kernel["overwritten"]
        assert overwritten is None if kernel["constants"]["LORA"] else overwritten != 0, kernel
        # nothing is read or written that the kernel before may still work on: of x A^T, only u
        first = "first_write" if kernel["constants"]["BESIDE"] else "first_access"
        assert kernel[first] == "griddepcontrol.wait", kernel
