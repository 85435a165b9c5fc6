from array import array

import numpy as np
import pytest

from headrace.engine.flat_rows import FlatRows
from headrace.engine.messages import SamplingParams
from headrace.engine.request import Request


def request(tokens: list[int], computed: int, *tables: list[int], in_flight: int = -1) -> Request:
    return Request(
        request_id="r",
        prompt_len=1,
        params=SamplingParams(max_tokens=99),
        adapter=None,
        arrival=(0.0, 0),
        seed=0,
        token_ids=array("q", tokens),
        limit=100,
        num_computed=computed,
        num_in_flight=int(in_flight >= 0),
        sampled_row=in_flight,
        block_tables=[array("i", table) for table in tables],
    )


def rows() -> FlatRows:
    """A chunk of three tokens from position 3, and a decode row whose token is row 5's sample."""
    chunk = request([10, 11, 12, 13, 14, 15, 16], 3, [4, 7], [-1, 8])
    decode = request([20, 21, 22, 23, 24, 25, 26, 27], 8, [0, 1, 2], [-1, -1, 9], in_flight=5)
    return FlatRows.of([(chunk, 3), (decode, 1)], [2, 3], block_size=4)


def test_rows_of_a_chunk_and_of_a_token_in_flight() -> None:
    found = rows()
    assert found.token_ids.tolist() == [13, 14, 15, -6]
    assert found.positions.tolist() == [3, 4, 5, 8]
    assert found.query_start.tolist() == [0, 3, 4]
    assert found.seq_lens.tolist() == [6, 9]
    assert found.output_rows.tolist() == [2, 3]


def test_slots_and_tables() -> None:
    found = rows()
    assert found.slots[0].tolist() == [4 * 4 + 3, 7 * 4, 7 * 4 + 1, 2 * 4]
    assert found.slots[1].tolist()[1:] == [8 * 4, 8 * 4 + 1, 9 * 4]
    assert found.block_tables[0].T.tolist() == [[4, 7, -1], [0, 1, 2]]
    assert found.block_tables[1].T.tolist() == [[-1, 8, -1], [-1, -1, 9]]


@pytest.mark.parametrize("found", [rows(), FlatRows.idle(7, 1, 2)])
def test_capacities_hold_the_arrays(found: FlatRows) -> None:
    num_tokens, num_seqs = len(found.token_ids), len(found.seq_lens)
    capacities = FlatRows.capacities(num_tokens, num_seqs, 3, 2)
    sizes = [array.nbytes for array in found.arrays()]
    assert all(size <= capacity for size, capacity in zip(sizes, capacities, strict=True))
    dtypes = [array.dtype for array in found.arrays()]
    assert dtypes == [np.dtype(d) for d in ["i8", "i8", "i4", "i4", "i8", "i8", "i8", "i4", "i4"]]


def test_idle_rows_write_nothing() -> None:
    idle = FlatRows.idle(3, 1, 2)
    assert [slots.tolist() for slots in idle.slots] == [[-1] * 3] * 2
    assert idle.seq_lens.tolist() == [1, 1, 1]
    assert idle.query_start.tolist() == [0, 1, 2, 3]
    chunk = FlatRows.idle(1, 5, 2, num_blocks=3)
    assert chunk.positions.tolist() == [0, 1, 2, 3, 4]
    assert (chunk.seq_lens.tolist(), chunk.output_rows.tolist()) == ([5], [4])
    assert chunk.block_tables[1].shape == (3, 1)


def test_padding_is_one_sequence_that_writes_nothing_and_empty_ones() -> None:
    found, padded = rows(), rows().padded(num_tokens=13, num_seqs=5, num_outputs=4, block_size=4)
    assert padded.token_ids.tolist() == [*found.token_ids, *[0] * 9]
    assert padded.positions.tolist() == [*found.positions, *range(9)]
    assert padded.query_start.tolist() == [0, 3, 4, 13, 13, 13]
    assert padded.seq_lens.tolist() == [6, 9, 9, 0, 0]
    assert padded.output_rows.tolist() == [2, 3, 0, 0]
    for old, new in zip(found.slots, padded.slots, strict=True):
        assert new.tolist() == [*old, *[-1] * 9]
    for old, new in zip(found.block_tables, padded.block_tables, strict=True):
        assert new[:, :2].tolist() == old.tolist()
        assert new[:, 2:].tolist() == [[0, -1, -1]] * 3
    for old, new in zip(found.arrays(), padded.arrays(), strict=True):
        assert new.dtype == old.dtype


def test_no_padding_is_needed_for_the_size_itself() -> None:
    found, padded = rows(), rows().padded(num_tokens=4, num_seqs=3, num_outputs=2, block_size=4)
    assert padded.token_ids.tolist() == found.token_ids.tolist()
    assert padded.query_start.tolist() == [0, 3, 4, 4]
    assert padded.seq_lens.tolist() == [6, 9, 0]


def test_padding_of_more_blocks_than_the_requests_have() -> None:
    padded = rows().padded(num_tokens=22, num_seqs=3, num_outputs=2, block_size=4)
    assert [table[:, 2].tolist() for table in padded.block_tables] == [[0] * 5] * 2
    assert padded.block_tables[0][3:, :2].tolist() == [[-1, -1]] * 2
