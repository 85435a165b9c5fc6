"""Which program computes which part of a step's attention: a list of items, made on the host.

Keys are cut into splits at fixed absolute positions, and a row's splits are merged in rising
order, so how the list shares out the work never changes a bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# Keys before CUTS[0] are in splits of SPLITS[0] keys, so that short contexts spread over many
# programs, those before CUTS[1] in splits of SPLITS[1], the others in splits of SPLITS[2]: a row
# of 131072 keys has 82 parts to merge and not 1024.
SPLITS = (128, 512, 2048)
CUTS = (1024, 8192)

HEADER = 4  # words: number of items, three unused
# Fields of an item, each a word.
FIELDS = range(10)
(
    ROW,  # of q: the tile's first token
    NUM_TOKENS,  # of the tile
    POSITION,  # of its first token
    SEQ,  # row of the block table
    FIRST_BLOCK,  # of keys
    END_BLOCK,
    PARTS,  # items that share the tile; 1: this one has all its keys and writes the output
    PART,  # index of this one among them
    PART_ROW,  # where its partial results go
    COUNTER,  # index of the tile among those with several parts
) = FIELDS


@dataclass(frozen=True)
class AttentionTile:
    """How the kernel is compiled. The bits of a result depend on `keys` alone."""

    rows: int = 64  # query rows (tokens x heads of a KV head) scored at once
    # scored at once: a power of two that divides every split. 64 decode rows of 560 tokens take 33
    # us, those with a window of 128 take 12; with 128 keys and two programs an SM 35 and 15.
    keys: int = 64
    num_warps: int = 4
    num_stages: int = 2  # 16 prompts of 512 tokens: 169 us, with 3 stages 184
    programs_per_sm: int = 4

    @property
    def max_registers(self) -> int | None:
        """Of a thread, for so many programs to fit on an SM; None: as many as it can have."""
        share = 65536 // (self.programs_per_sm * self.num_warps * 32)
        return None if share >= 256 else share // 8 * 8


@dataclass(frozen=True)
class PlanShape:
    """How much a plan can hold: fixed when a CUDA graph is captured."""

    tile: AttentionTile
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_items: int
    max_part_rows: int  # tokens x parts of all tiles that are split
    num_programs: int  # of the kernel, at least: they share out items x num_kv_heads
    split_above: float = 3.0  # tiles longer than so many times (a fair share of all + 1 block)

    @property
    def tile_tokens(self) -> int:
        """Query tokens of an item, each with the heads that share a KV head."""
        return self.tile.rows * self.num_kv_heads // self.num_heads

    def grid(self, num_tokens: int) -> int:
        """Programs of the kernel for so many rows: in a large chunk, one for every two tiles.

        16 x 512 tokens: 175 us with 32 programs an SM, 182 with 4. Where they find no work,
        32 cost 2 us.
        """
        return max(self.num_programs, num_tokens // self.tile_tokens * self.num_kv_heads // 2)

    @property
    def num_words(self) -> int:
        """Length of the plan: header, items, then counters of arrived parts."""
        return self.counters_start + self.max_part_rows // 2 * self.num_kv_heads

    @property
    def counters_start(self) -> int:
        """Counters are zero before the first use, and every use leaves them zero."""
        return HEADER + self.max_items * len(FIELDS)


@dataclass(frozen=True)
class AttentionPlan:
    """A plan where the kernel reads it, for all layers with the same window, one after the other.

    Captured CUDA graphs of all batch sizes can share it: the kernel reads how many items it has.
    """

    words: Tensor  # [shape.num_words] int32: header, items, counters
    part_acc: Tensor  # [max_part_rows, num_heads, head_dim] float32: results of single parts
    part_m: Tensor  # [max_part_rows, num_heads] float32
    part_total: Tensor  # [max_part_rows, num_heads] float32
    shape: PlanShape
    window: int
    single_rows: bool = False  # no sequence has more than one row in the step

    @property
    def tile(self) -> AttentionTile:
        """The shape's, or for single rows one of a token's heads, but 16 rows at least.

        64 sequences of 560 tokens: 29.6 us, with 64 rows 32.2; in a window of 128 10.6 and 12.9.
        """
        if not self.single_rows:
            return self.shape.tile
        group = self.shape.num_heads // self.shape.num_kv_heads
        rows = max(16, 1 << (group - 1).bit_length())
        return replace(self.shape.tile, rows=rows, num_stages=3)

    def for_rows(self, query_lens: np.ndarray) -> AttentionPlan:
        """The same memory, read by a step in which the sequences have so many rows."""
        return replace(self, single_rows=bool(query_lens.max(initial=0) <= 1))

    def fill(self, query_lens: np.ndarray, seq_lens: np.ndarray) -> AttentionPlan:
        """Plan a step, `for_rows`; waits for the GPU, which words in pinned memory would not."""
        words = plan_attention(query_lens, seq_lens, self.window, self.shape)
        self.words[: len(words)].copy_(torch.from_numpy(words))
        return self.for_rows(query_lens)


def empty_plan(shape: PlanShape, window: int, device: torch.device | str) -> AttentionPlan:
    """A plan without an item, and the memory that it needs."""
    rows = (shape.max_part_rows if window == 0 else 0, shape.num_heads)
    return AttentionPlan(
        torch.zeros(shape.num_words, dtype=torch.int32, device=device),
        torch.empty(*rows, shape.head_dim, device=device),
        torch.empty(rows, device=device),
        torch.empty(rows, device=device),
        shape,
        window,
    )


def plan_shape(
    max_num_tokens: int,  # rows of a step
    max_num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sms: int = 132,
    max_part_rows: int = 4096,
    tile: AttentionTile = AttentionTile(),
) -> PlanShape:
    """Room for every batch of such a size, whatever the lengths of its contexts.

    Raises:
        ValueError: the heads of a KV head do not fit into a tile.
    """
    group = num_heads // num_kv_heads
    if num_heads % num_kv_heads or group > tile.rows:
        raise ValueError(
            f"{num_heads} heads on {num_kv_heads} KV heads: a KV head must have a whole number of "
            f"heads, {tile.rows} at most"
        )
    tiles = min(max_num_tokens, max_num_seqs + max_num_tokens // (tile.rows // group))
    return PlanShape(
        tile,
        num_heads,
        num_kv_heads,
        head_dim,
        max_items=tiles + max_part_rows,
        max_part_rows=max_part_rows,
        # Twice what fits: the second half starts where a program has ended, and so evens out items
        # of different lengths (8 rows of 16384 keys: 117 us against 136).
        num_programs=2 * num_sms * tile.programs_per_sm,
    )


def first_key_of(split: np.ndarray) -> np.ndarray:
    """Where each split begins, for indices 0, 1, 2, ..."""
    first, second = CUTS[0] // SPLITS[0], CUTS[0] // SPLITS[0] + (CUTS[1] - CUTS[0]) // SPLITS[1]
    in_second = CUTS[0] + (split - first) * SPLITS[1]
    in_third = CUTS[1] + (split - second) * SPLITS[2]
    return np.where(split < first, split * SPLITS[0], np.where(split < second, in_second, in_third))


def num_splits(num_keys: np.ndarray) -> np.ndarray:
    """Splits that keys 0:num_keys fall into."""
    first = -(-np.minimum(num_keys, CUTS[0]) // SPLITS[0])
    second = -(-(np.clip(num_keys, *CUTS) - CUTS[0]) // SPLITS[1])
    return first + second - (-(np.maximum(num_keys, CUTS[1]) - CUTS[1]) // SPLITS[2])


def plan_attention(
    query_lens: np.ndarray,  # [num_seqs] rows of each sequence in this step
    seq_lens: np.ndarray,  # [num_seqs] tokens in the cache after this step
    window: int,  # 0 = all
    shape: PlanShape,
) -> np.ndarray:
    """The items of a step, longest first, as header + items [num_items, len(FIELDS)], int32.

    A tile is up to tile_tokens rows of one sequence. With full attention a tile much longer than
    a program's fair share becomes one item per split, the longest first while max_part_rows
    lasts. The result goes to the front of AttentionPlan.words.

    Raises:
        ValueError: the batch has more tiles than the shape has room for.
    """
    tiles = _tiles(query_lens, seq_lens, window, shape)
    parts = np.ones(len(tiles), np.int64) if window else _parts(tiles, shape)
    num_items = int(parts.sum())
    if num_items > shape.max_items:
        raise ValueError(
            f"{len(tiles)} tiles of {shape.tile_tokens} rows need {num_items} items, the plan has "
            f"room for {shape.max_items}: make its shape for more tokens or sequences"
        )
    items = tiles if num_items == len(tiles) else _split(tiles, parts, shape.tile.keys)
    longest_first = np.argsort(items[:, FIRST_BLOCK] - items[:, END_BLOCK], kind="stable")
    words = np.zeros(HEADER + items.size, np.int32)
    words[0] = num_items
    words[HEADER:] = items[longest_first].ravel()
    return words


def _tiles(
    query_lens: np.ndarray, seq_lens: np.ndarray, window: int, shape: PlanShape
) -> np.ndarray:
    """Every tile as an item that has all its keys, [num_tiles, len(FIELDS)] int64."""
    tile_tokens, keys = shape.tile_tokens, shape.tile.keys
    query_lens, seq_lens = query_lens.astype(np.int64), seq_lens.astype(np.int64)
    tiles_of = -(-query_lens // tile_tokens)
    seq = np.repeat(np.arange(len(query_lens)), tiles_of)
    offset = (np.arange(len(seq)) - (tiles_of.cumsum() - tiles_of)[seq]) * tile_tokens
    position = (seq_lens - query_lens)[seq] + offset
    tiles = np.zeros((len(seq), len(FIELDS)), np.int64)
    tiles[:, ROW] = (query_lens.cumsum() - query_lens)[seq] + offset
    tiles[:, NUM_TOKENS] = np.minimum(tile_tokens, query_lens[seq] - offset)
    tiles[:, POSITION] = position
    tiles[:, SEQ] = seq
    if window:
        tiles[:, FIRST_BLOCK] = np.maximum(position - window + 1, 0) // keys
    tiles[:, END_BLOCK] = -(-(position + tiles[:, NUM_TOKENS]) // keys)
    tiles[:, PARTS] = 1
    return tiles


def _parts(tiles: np.ndarray, shape: PlanShape) -> np.ndarray:
    """Items that each tile becomes."""
    blocks = tiles[:, END_BLOCK]
    parts = num_splits(blocks * shape.tile.keys)
    fair_share = blocks.sum() * shape.num_kv_heads / shape.num_programs
    parts[blocks <= shape.split_above * (fair_share + 1)] = 1
    rows = np.where(parts > 1, parts * tiles[:, NUM_TOKENS], 0)
    longest_first = np.argsort(-blocks, kind="stable")
    too_many = rows[longest_first].cumsum() > shape.max_part_rows
    parts[longest_first[too_many]] = 1
    return parts


def _split(tiles: np.ndarray, parts: np.ndarray, keys: int) -> np.ndarray:
    """The items of each tile, one for each of its parts."""
    is_split = parts > 1
    rows = np.where(is_split, parts * tiles[:, NUM_TOKENS], 0)
    tiles[:, PARTS] = parts
    tiles[:, PART_ROW] = rows.cumsum() - rows
    tiles[:, COUNTER] = is_split.cumsum() - is_split
    items = np.repeat(tiles, parts, axis=0)
    part = np.arange(len(items)) - np.repeat(parts.cumsum() - parts, parts)
    end = np.minimum(first_key_of(part + 1) // keys, items[:, END_BLOCK])
    split = items[:, PARTS] > 1
    items[:, FIRST_BLOCK] = np.where(split, first_key_of(part) // keys, 0)
    items[:, END_BLOCK] = np.where(split, end, items[:, END_BLOCK])
    items[:, PART] = part
    items[:, PART_ROW] += part * items[:, NUM_TOKENS]
    return items
