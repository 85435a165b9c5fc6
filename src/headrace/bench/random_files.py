"""Random tensors as safetensors files, drawn and written by many threads.

A tensor is drawn in pieces with a seed each, so that a file is the same whatever the number of
threads.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.config import ConfigError

PIECE_BYTES = 2**24

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)
Table = np.ndarray[Any, np.dtype[Any]]  # 65536 bf16 (as int16) or 256 uint8: bits -> stored value


@dataclass(frozen=True)
class RandomTensor:
    """What to draw: each value is the entry of the table that random bits choose."""

    shape: tuple[int, ...]
    table: Table

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.table.itemsize


@dataclass(frozen=True)
class Piece:
    """A part of one tensor: where it goes and what it is drawn from."""

    path: Path
    offset: int  # bytes from the start of the file
    num_bytes: int
    seed: tuple[int, int, int]  # of all files; tensor; piece
    table: Table


@functools.cache
def normal_table(std: float, mean: float = 0.0) -> Table:
    """The 65536 quantiles of a normal distribution, in bf16."""
    quantiles = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    return (quantiles * std + mean).bfloat16().view(torch.int16).numpy()


def write_random(
    files: Mapping[Path, Mapping[str, RandomTensor]], seed: int, progress: Progress | None = None
) -> None:
    """Write the tensors of each file. ConfigError, before anything is written, if room is short."""
    total, done = sum(t.num_bytes for file in files.values() for t in file.values()), 0
    folder = next(iter(files)).parent
    free = shutil.disk_usage(folder).free
    if free < total * 1.01:
        raise ConfigError(f"{folder} has {free / 1e9:.1f} GB of room; this needs {total / 1e9:.1f}")
    pieces = list(_pieces(files, seed))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in as_completed([pool.submit(_write_piece, piece) for piece in pieces]):
            done += future.result()
            if progress:
                progress(done, total)


def _pieces(files: Mapping[Path, Mapping[str, RandomTensor]], seed: int) -> Iterator[Piece]:
    """Start the files with their headers, and cut the tensors."""
    number = 0
    for path, tensors in files.items():
        start = _write_header(path, tensors)
        for tensor in tensors.values():
            end = start + tensor.num_bytes
            for i, offset in enumerate(range(start, end, PIECE_BYTES)):
                size = min(PIECE_BYTES, end - offset)
                yield Piece(path, offset, size, (seed, number, i), tensor.table)
            start, number = end, number + 1


def _write_header(path: Path, tensors: Mapping[str, RandomTensor]) -> int:
    """Start a safetensors file of its full size; returns where the data begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        dtype = "U8" if tensor.table.itemsize == 1 else "BF16"
        entries[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + end)
    return 8 + len(header)


def _write_piece(piece: Piece) -> int:
    """Random bits, through the table, to the file; numpy leaves the other threads alone."""
    bits = np.random.SFC64(piece.seed).random_raw(-(-piece.num_bytes // 8))
    values = piece.table.take(bits.view(f"u{piece.table.itemsize}"))
    with piece.path.open("r+b") as out:
        os.pwrite(out.fileno(), values.view(np.uint8)[: piece.num_bytes].data, piece.offset)
    return piece.num_bytes
