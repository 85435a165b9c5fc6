import pytest
import torch

from headrace.ops.move_kernel import move

BLOCK = torch.randint(-(1 << 31), 1 << 31, (5000,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "device",
    [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("arrays", [[(0, 1)], [(64, 3000), (4000, 7), (9, 0), (3, 1024)]])
def test_each_array_goes_to_its_place(arrays, device) -> None:
    on_gpu = device.type == "cuda"
    block, table = BLOCK.int(), torch.tensor([(first, 0, n) for first, n in arrays])
    block, table = (t.pin_memory() if on_gpu else t for t in (block, table))
    targets = [torch.full((n + 2,), 7, dtype=torch.int32, device=device) for _, n in arrays]
    table[:, 1] = torch.tensor([target.data_ptr() for target in targets])
    move(table, block, max(n for _, n in arrays))
    for (first, n), target in zip(arrays, targets, strict=True):
        assert torch.equal(target[:n].cpu(), block[first : first + n])
        assert target[n:].tolist() == [7, 7]


def test_nothing_to_move() -> None:
    move(torch.empty(0, 3, dtype=torch.int64), BLOCK.int(), 0)
