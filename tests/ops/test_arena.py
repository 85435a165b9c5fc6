import pytest
import torch

from headrace.ops.arena import ALIGNMENT, Arena, ArenaSize, Take, fresh

SHAPES = [((3, 5), torch.bfloat16), ((0, 7), torch.float32), ((2, 2), torch.int64)]


def take_all(take: Take) -> list[torch.Tensor]:
    return [take(shape, dtype) for shape, dtype in SHAPES]


def test_the_measured_size_fits_and_nothing_overlaps() -> None:
    size = ArenaSize()
    wanted = take_all(size.take)
    arena = Arena(size.num_bytes, "cpu")
    got = take_all(arena.take)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in wanted]
    for i, tensor in enumerate(got):
        tensor.fill_(i + 1)
    assert all((tensor == i + 1).all() for i, tensor in enumerate(got))
    assert all(t.data_ptr() % 8 == 0 for t in got)
    assert size.num_bytes == 2 * ALIGNMENT


def test_after_a_reset_the_addresses_are_the_same() -> None:
    arena = Arena(1024, "cpu")
    first = [t.data_ptr() for t in take_all(arena.take)]
    arena.reset()
    assert [t.data_ptr() for t in take_all(arena.take)] == first


def test_too_much() -> None:
    arena = Arena(64, "cpu")
    arena.take((8,), torch.float32)
    with pytest.raises(MemoryError, match=r"shape \(40,\) needs 296 bytes .* has 64"):
        arena.take((40,), torch.uint8)


def test_fresh_tensors_are_their_own() -> None:
    got = take_all(fresh("cpu")) + take_all(fresh("cpu"))
    assert [(tuple(t.shape), t.dtype) for t in got] == SHAPES * 2
    assert len({t.data_ptr() for t in got if t.numel()}) == 4
