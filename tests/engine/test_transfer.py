import numpy as np
import pytest
import torch

from headrace.engine.transfer import ALIGNMENT, Download, upload

CPU = torch.device("cpu")
ARRAYS = [
    np.arange(3),
    np.array([0.5], dtype=np.float32),
    np.array([], dtype=np.int64),
    np.array([1.5, -2.0]),
    np.arange(20, dtype=np.int32)[::4],
]


@pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str
)
def test_there_and_back(device: torch.device) -> None:
    placed = upload(ARRAYS, device)
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in placed if len(t))
    download = Download(placed)
    for tensor in placed:
        tensor.zero_()
    for array, tensor in zip(ARRAYS, download.read(), strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert tensor.tolist() == array.tolist()


def test_empty_arrays() -> None:
    assert [len(t) for t in upload([np.array([], dtype=np.int64)] * 2, CPU)] == [0, 0]
    assert Download([]).read() == []


@pytest.mark.gpu
def test_nobody_waits() -> None:
    def both_ways() -> list[Download]:
        placed = [upload([np.full(1000, i)], torch.device("cuda"))[0] for i in range(50)]
        return [Download([tensor]) for tensor in placed]

    # from now on there is pinned memory for 50 uploads beside 50 downloads
    for download in [*both_ways(), *both_ways()]:
        download.read()
    busy = torch.randn(8192, 8192, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            busy = busy @ busy * 1e-4
        downloads = both_ways()
        still_busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert still_busy
    assert [d.read()[0].sum().item() for d in downloads] == [1000 * i for i in range(50)]
