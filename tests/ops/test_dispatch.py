"""The CPU backend needs no Triton: torch's wheels without CUDA don't bring it."""

import subprocess
import sys

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton: ModuleNotFoundError
import headrace.engine.process, headrace.lora.report, headrace.server.app
import torch
from headrace.ops import dispatch
x = torch.ones(2, 3)
assert not dispatch.takes_kernel(x) and not dispatch.is_hopper(x) and dispatch.num_sms(x) == 1
try:
    dispatch.gpu_limits(0)
except ModuleNotFoundError:
    print("only a GPU asks for it")
"""


def test_the_cpu_backend_needs_no_triton() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "only a GPU asks for it\n"
