"""The host's side of a batch: rows of many requests, one request after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.engine.request import Request


@dataclass(frozen=True)
class FlatRows:
    """The host's side of a Batch. Block tables lie block by block, so that a table of fewer
    blocks is the beginning of a larger one."""

    token_ids: np.ndarray  # [num_tokens] int64
    positions: np.ndarray  # [num_tokens] int64
    query_start: np.ndarray  # [num_seqs + 1] int32
    seq_lens: np.ndarray  # [num_seqs] int32
    output_rows: np.ndarray  # [num_outputs] int64
    slots: list[np.ndarray]  # [num_groups] of [num_tokens] int64
    block_tables: list[np.ndarray]  # [num_groups] of [max_blocks, num_seqs] int32, padded with -1

    @staticmethod
    def of(
        work: Sequence[tuple[Request, int]], output_rows: Sequence[int], block_size: int
    ) -> FlatRows:
        """The rows of (request, number of tokens), one request after the other."""
        starts = np.array([request.num_computed for request, _ in work])
        counts = np.array([n for _, n in work])
        query_start = np.concatenate(([0], counts.cumsum()))
        positions = np.repeat(starts - query_start[:-1], counts) + np.arange(query_start[-1])
        blocks, offsets = np.divmod(positions, block_size)
        seqs = np.repeat(np.arange(len(work)), counts)
        tables = [
            block_table([request.block_tables[g] for request, _ in work])
            for g in range(len(work[0][0].block_tables))
        ]
        return FlatRows(
            token_ids=np.concatenate([request.next_tokens(n) for request, n in work]),
            positions=positions,
            query_start=query_start.astype(np.int32),
            seq_lens=(starts + counts).astype(np.int32),
            output_rows=np.array(output_rows, dtype=np.int64),
            slots=[table[blocks, seqs] * np.int64(block_size) + offsets for table in tables],
            block_tables=tables,
        )

    @staticmethod
    def idle(num_seqs: int, num_tokens: int, num_groups: int, num_blocks: int = 1) -> FlatRows:
        """Rows that write nothing: num_tokens of each sequence, whose blocks are all on page 0."""
        rows = np.arange(num_seqs * num_tokens)
        starts = np.arange(num_seqs + 1, dtype=np.int32) * np.int32(num_tokens)
        return FlatRows(
            token_ids=rows * 0,
            positions=rows % num_tokens,
            query_start=starts,
            seq_lens=np.diff(starts),
            output_rows=starts[1:].astype(np.int64) - 1,
            slots=[rows * 0 - 1] * num_groups,
            block_tables=[np.zeros((num_blocks, num_seqs), dtype=np.int32)] * num_groups,
        )

    def padded(self, num_tokens: int, num_seqs: int, num_outputs: int, block_size: int) -> FlatRows:
        """The same and one more sequence, whose tokens write nothing, and then empty ones.

        Its outputs are those of row 0.
        """
        more = num_tokens - len(self.token_ids)
        ones = num_seqs - len(self.seq_lens)  # the one more sequence, and the empty ones
        idle = FlatRows.idle(1, more, len(self.slots), -(-more // block_size))
        return FlatRows(
            token_ids=np.concatenate((self.token_ids, idle.token_ids)),
            positions=np.concatenate((self.positions, idle.positions)),
            query_start=np.pad(self.query_start, (0, ones), constant_values=num_tokens),
            seq_lens=np.pad(np.append(self.seq_lens, np.int32(more)), (0, ones - 1)),
            output_rows=np.pad(self.output_rows, (0, num_outputs - len(self.output_rows))),
            slots=[np.concatenate(both) for both in zip(self.slots, idle.slots, strict=True)],
            block_tables=[
                _beside(*both, num_seqs)
                for both in zip(self.block_tables, idle.block_tables, strict=True)
            ],
        )

    def arrays(self) -> list[np.ndarray]:
        """All arrays, in the order of the fields; the block tables, which vary most, come last."""
        fixed = [self.token_ids, self.positions, self.query_start, self.seq_lens, self.output_rows]
        return [*fixed, *self.slots, *self.block_tables]

    @staticmethod
    def capacities(num_tokens: int, num_seqs: int, max_blocks: int, num_groups: int) -> list[int]:
        """Bytes that each of the arrays takes at most; outputs: one a token, or one a sequence."""
        num_outputs = max(num_tokens, num_seqs)
        fixed = [8 * num_tokens, 8 * num_tokens, 4 * (num_seqs + 1), 4 * num_seqs, 8 * num_outputs]
        return fixed + num_groups * [8 * num_tokens] + num_groups * [4 * max_blocks * num_seqs]


def block_table(tables: Sequence[Sequence[int]]) -> np.ndarray:  # [max_blocks, num_seqs] int32
    """Pages of each sequence as a column, padded with -1."""
    padded = np.full((len(tables), max(map(len, tables))), -1, dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return np.ascontiguousarray(padded.T)


def _beside(table: np.ndarray, other: np.ndarray, num_seqs: int) -> np.ndarray:
    """Two block tables as one of num_seqs sequences, padded with -1."""
    wide = np.full((max(len(table), len(other)), num_seqs), -1, dtype=np.int32)
    columns = table.shape[1]
    wide[: len(table), :columns] = table
    wide[: len(other), columns : columns + other.shape[1]] = other
    return wide
