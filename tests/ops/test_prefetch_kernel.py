"""What is asked for; that nothing else changes is in the tests of the kernels that ask."""

import pytest
import torch

from headrace.ops.prefetch_kernel import prefetchable


def test_nothing_is_asked_for_without_a_gpu():
    assert prefetchable(None) is None
    assert prefetchable(torch.zeros(64, 64, dtype=torch.bfloat16)) is None


@pytest.mark.gpu
def test_gpu_only_pieces_of_16_bytes_of_16_bit_values():
    weight = torch.zeros(64, 64, dtype=torch.bfloat16, device="cuda")
    bulk = torch.cuda.get_device_capability() >= (9, 0)
    assert (prefetchable(weight) is weight) == bulk
    for other in (weight[:, 1:], weight.view(-1)[1:], weight.view(-1)[:9], weight.float()):
        assert prefetchable(other) is None
