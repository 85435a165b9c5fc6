import numpy as np
import pytest
import torch

from headrace.engine.staging import ALIGNMENT, Staging, _runs, _starts

ARRAYS = [np.arange(7), np.arange(5, dtype=np.int32), np.arange(12, dtype=np.int32).reshape(4, 3)]


def test_neighbours_are_copied_together() -> None:
    assert _starts([56, 300, 10]) == [0, 256, 768, 1024]
    assert _runs([0, 256, 768], [56, 300, 10]) == [(0, 778)]


def test_unused_capacity_is_not_copied() -> None:
    starts = _starts([8, 4096, 4096])
    assert _runs(starts, [8, 16, 32]) == [(0, 272), (4352, 4384)]
    assert _runs(starts, [0, 16, 0]) == [(256, 272)]


def test_on_the_cpu_nothing_is_copied() -> None:
    tensors = Staging([8, 8, 8], torch.device("cpu")).put(ARRAYS)
    assert [t.data_ptr() for t in tensors] == [a.ctypes.data for a in ARRAYS]


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
        (tensor,) = staging.put([np.full(1 << 17, step)])
        staging.copy(np.full(5, step, dtype=np.int32), to)
        found.append((tensor.clone(), to[:5].clone()))
    for step, copied in enumerate(found):
        assert all((t == step).all() for t in copied), step
