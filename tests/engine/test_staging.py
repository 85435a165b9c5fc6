import numpy as np
import pytest
import torch

from headrace.engine.staging import ALIGNMENT, Staging

ARRAYS = [np.arange(7), np.arange(5, dtype=np.int32), np.arange(12, dtype=np.int32).reshape(4, 3)]


def test_on_the_cpu_nothing_is_copied_but_what_has_its_place() -> None:
    to = torch.zeros(5, dtype=torch.int64)
    tensors = Staging([8, 8, 8], torch.device("cpu")).put(ARRAYS, more=[(np.arange(1, 4), to)])
    assert [t.data_ptr() for t in tensors] == [a.ctypes.data for a in ARRAYS]
    assert to.tolist() == [1, 2, 3, 0, 0]


@pytest.mark.gpu
def test_addresses_depend_on_the_capacities_alone() -> None:
    staging = Staging([4096] * 3, torch.device("cuda"))
    capacities = [64, 640, 64]
    first = [t.data_ptr() for t in staging.put(ARRAYS, capacities)]
    larger = [ARRAYS[0] + 1, np.arange(100, dtype=np.int32), ARRAYS[2] + 1]
    tensors = staging.put(larger, capacities)
    assert [t.data_ptr() for t in tensors] == first
    for tensor, array in zip(tensors, larger, strict=True):
        assert np.array_equal(tensor.cpu().numpy(), array)
    assert first[1] - first[0] == ALIGNMENT


@pytest.mark.gpu
def test_a_host_that_runs_ahead_overwrites_nothing() -> None:
    """Steps of 10 ms each, which nobody waits for: as the chunks of one long prompt."""
    staging = Staging([1 << 20], torch.device("cuda"))
    to = torch.zeros(1 << 17, dtype=torch.int32, device="cuda")
    found = []
    for step in range(8):
        torch.cuda._sleep(20_000_000)
        few = np.full(5, step, dtype=np.int32)
        (tensor,) = staging.put([np.full(1 << 17, step)], more=[(few, to)])
        found.append((tensor.clone(), to[:5].clone()))
    for step, copied in enumerate(found):
        assert all((t == step).all() for t in copied), step
