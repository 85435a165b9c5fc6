"""A load's threads compute alone."""

from __future__ import annotations

import torch

from headrace.lora import threads


def test_helpers_compute_alone() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert threads.helpers().submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)
