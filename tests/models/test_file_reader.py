from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from headrace.models.file_reader import CHUNK_BYTES, FilePiece, FileReader, read_exactly

CPU = torch.device("cpu")


@pytest.fixture
def reader() -> Iterator[FileReader]:
    with closing(FileReader(CPU)) as reader:
        yield reader


def file_of(path: Path, data: torch.Tensor, before: int = 0) -> Path:
    path.write_bytes(bytes(before) + data.flatten().view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 2)])
def test_a_piece_of_a_file_is_a_tensor(
    tmp_path: Path, reader: FileReader, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    data = torch.randint(1, 100, shape).to(dtype)
    file = file_of(tmp_path / "f", data, before=24)
    read = reader.start(FilePiece(file, 24, dtype, shape)).wait()
    assert read.dtype == dtype
    assert torch.equal(read, data)


def test_many_chunks_and_many_tensors_at_once(tmp_path: Path, reader: FileReader) -> None:
    data = torch.randint(0, 256, (2 * CHUNK_BYTES + 12345,), dtype=torch.uint8)
    file = file_of(tmp_path / "f", data)
    pieces = [FilePiece(file, at, torch.uint8, (len(data) - at,)) for at in (0, 1, 999)]
    pending = [reader.start(piece) for piece in pieces]
    for piece, read in zip(pieces, pending, strict=True):
        assert torch.equal(read.wait(), data[piece.offset :])


def test_a_tensor_of_inference_mode(tmp_path: Path, reader: FileReader) -> None:
    data = torch.arange(100, dtype=torch.uint8)
    with torch.inference_mode():
        read = reader.start(FilePiece(file_of(tmp_path / "f", data), 0, torch.uint8, (100,))).wait()
    assert torch.equal(read, data)


def test_a_file_that_ends_too_early(tmp_path: Path, reader: FileReader) -> None:
    file = file_of(tmp_path / "f", torch.ones(100, dtype=torch.uint8))
    with pytest.raises(OSError, match="ends at byte 100"):
        reader.start(FilePiece(file, 40, torch.uint8, (61,))).wait()
    assert reader.start(FilePiece(file, 40, torch.uint8, (60,))).wait().sum() == 60


def test_a_file_that_is_gone(tmp_path: Path, reader: FileReader) -> None:
    with pytest.raises(FileNotFoundError):
        reader.start(FilePiece(tmp_path / "gone", 0, torch.uint8, (1,))).wait()


def test_only_the_bytes_asked_for_are_written(tmp_path: Path) -> None:
    file = file_of(tmp_path / "f", torch.arange(100, dtype=torch.uint8))
    target = torch.zeros(10, dtype=torch.uint8)
    read_exactly(file, target[2:7], 50)
    assert target.tolist() == [0, 0, 50, 51, 52, 53, 54, 0, 0, 0]


@pytest.mark.gpu
def test_memory_that_a_kernel_still_reads_is_not_overwritten(tmp_path: Path) -> None:
    """The allocator gives a freed tensor's memory to the next one at once."""
    device = torch.device("cuda")
    size = 4 * CHUNK_BYTES
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    piece = FilePiece(file_of(tmp_path / "f", data), 0, torch.uint8, (size,))
    with closing(FileReader(device)) as reader:
        reader.start(piece).wait()  # the buffers of the threads
        for _ in range(3):
            old = torch.ones(size, dtype=torch.uint8, device=device)
            torch.cuda._sleep(200_000_000)  # about a tenth of a second
            total = old.sum(dtype=torch.int64)
            del old
            new = reader.start(piece).wait()
            assert total.item() == size
            assert torch.equal(new.cpu(), data)
            del new
