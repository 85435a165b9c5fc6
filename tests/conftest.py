"""Where there is no GPU, Triton's kernels run in its interpreter; it reads this when imported.

Nothing that differs from run to run decides whether a change passes: no clock, no new numbers.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the deadline of 200 ms is one of the clock on the wall: a machine that stalls fails the test
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)
