"""Checkpoints in Hugging Face layout: safetensors shards beside a config.json."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headrace.config import ConfigError
from headrace.files import read_json
from headrace.models.file_reader import FilePiece, FileReader, PendingTensor
from headrace.ops import mxfp4

INDEX_NAME = "model.safetensors.index.json"
Progress = Callable[[int, int], None]  # (bytes read, bytes in all)

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PACKED = {"U8": torch.uint8}


class Checkpoint:
    """The tensors of a checkpoint's root directory; original/ and metal/ are other formats.

    With a reader, tensors are read to its device; without, they are memory-mapped for the CPU.
    Raises ConfigError for a missing or unreadable file, and in `check` for every tensor that is
    missing, unknown, of another shape or of another kind of dtype than the model expects.
    """

    def __init__(
        self, path: Path, reader: FileReader | None = None, progress: Progress | None = None
    ) -> None:
        self.path = path
        self._reader = reader
        self._progress = progress
        self._bytes_read = 0
        self._files = {file: _open(file) for file in _shards(path)}
        self._file_of = {name: f for f in self._files.values() for name in f.keys()}  # noqa: SIM118
        _check_index(path, set(self._file_of))
        self.num_bytes = sum(self._num_bytes(name) for name in self._file_of)
        self._pieces = {n: p for file in self._files for n, p in _pieces(file)} if reader else {}
        self._pending: dict[str, PendingTensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and dtypes with what the model expects, before reading any."""
        problems = [
            *(f"missing tensor {name} {list(expected[name])}" for name in expected.keys() - self),
            *(f"unknown tensor {name}" for name in self._file_of.keys() - expected.keys()),
            *(p for n, shape in expected.items() if n in self for p in self._mismatch(n, shape)),
        ]
        if problems:
            shown = "; ".join(sorted(problems)[:8])
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ConfigError(f"checkpoint {self.path} does not fit its config.json: {shown}{more}")

    def prefetch(self, names: Iterable[str]) -> None:
        """Start to read tensors that will be wanted next, in this order."""
        for name in names:
            if self._reader and name not in self._pending:
                self._pending[name] = self._reader.start(self._pieces[name])

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, on the device."""
        try:
            tensor = self._read(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"tensor {name} of {self.path} cannot be read: {error}") from error
        self._bytes_read += tensor.nbytes
        if self._progress:
            self._progress(self._bytes_read, self.num_bytes)
        return tensor

    def _read(self, name: str) -> Tensor:
        if self._reader is None:
            mapped: Tensor = self._file_of[name].get_tensor(name)
            return mapped
        pending = self._pending.pop(name, None) or self._reader.start(self._pieces[name])
        return pending.wait()

    def _mismatch(self, name: str, expected: tuple[int, ...]) -> Iterator[str]:
        header = self._file_of[name].get_slice(name)
        found, dtype = tuple(header.get_shape()), header.get_dtype()
        kinds = _PACKED if name.endswith(("_blocks", "_scales")) else _FLOATS
        if found != expected:
            yield f"tensor {name} has shape {list(found)}, expected {list(expected)}"
        if dtype not in kinds:
            yield f"tensor {name} has dtype {dtype}, expected {' or '.join(kinds)}"

    def _num_bytes(self, name: str) -> int:
        header = self._file_of[name].get_slice(name)
        dtype = (_FLOATS | _PACKED).get(header.get_dtype(), torch.uint8)
        return prod(header.get_shape()) * dtype.itemsize


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and the tensors, as they are, as one file or as shards with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards = split_shards({name: t.nbytes for name, t in tensors.items()}, max_shard_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(names, shards, strict=True):
        held = {name: tensors[name].contiguous() for name in shard}
        save_file(held, path / file, metadata={"format": "pt"})


def quantize_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace dense expert weights [num_experts, in, out] by MXFP4 blocks and scales [.., out, ..].

    The inverse of the transposition that Hugging Face uses for dequantized experts.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = mxfp4.quantize(tensor.transpose(1, 2))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            packed[name] = tensor
    return packed


def _shards(path: Path) -> list[Path]:
    if (path / INDEX_NAME).exists():
        return [path / name for name in sorted(set(_weight_map(path).values()))]
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ConfigError(f"{path} has no *.safetensors; it must be a Hugging Face checkpoint")
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict):
        kind = type(weight_map).__name__
        raise ConfigError(f"{path / INDEX_NAME}: weight_map is a {kind}; it must be an object")
    return weight_map


def _check_index(path: Path, found: set[str]) -> None:
    if (path / INDEX_NAME).exists() and (lost := _weight_map(path).keys() - found):
        raise ConfigError(
            f"{path / INDEX_NAME} lists tensor {min(lost)}, but its file does not hold it; "
            "download the checkpoint again"
        )


def _open(file: Path) -> Any:
    """Checks the header and the file's size; reads no tensor."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _pieces(file: Path) -> Iterator[tuple[str, FilePiece]]:
    """Where the tensors of a file lie: 8 bytes of length, a header in JSON, then the data.

    Tensors of a dtype that no model expects are left out; `check` names them.
    """
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        dtype = (_FLOATS | _PACKED).get(entry.get("dtype"))
        if dtype is not None:
            start, _ = entry["data_offsets"]
            yield name, FilePiece(file, 8 + length + start, dtype, tuple(entry["shape"]))


def split_shards(num_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in their order; a larger one has a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, more in num_bytes.items():
        if shards[-1] and size + more > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards
