"""The low-rank factors of one target, in the form that the kernels read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.lora.targets import Target

EXPERT_TENSOR = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<name>gate_proj|up_proj|down_proj|w1|w2|w3)"
)
_PARTS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up"}  # the others: down


@dataclass(frozen=True)
class Factors:
    """y_e += scale (x A_e^T) B_e for each expert e; a dense target has one."""

    a: Tensor  # [num_experts, rank, in_features]
    b: Tensor  # [num_experts, rank, out_features]: a view of the file's tensor where it can be
    scale: float

    @property
    def rank(self) -> int:
        """Rank-1 terms of each expert."""
        return self.a.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of both factors, in the file's dtype."""
        return self.a.nbytes + self.b.nbytes

    def owned(self, pin: bool) -> Factors:
        """A copy in memory of its own, in the same order of bytes; with pin, in pinned memory."""
        a, b = (t.pin_memory() if pin else t.clone() for t in (self.a, self.b))
        return Factors(a, b, self.scale)

    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return not (self.a.any() and self.b.any() and self.scale)


@dataclass(frozen=True)
class ExpertFactors:
    """What a file of 2-D tensors holds for one matrix of one expert."""

    name: str  # of its lora_A tensor
    part: str  # gate, up or down
    index: int
    a: Tensor  # [rank, in_features]
    b: Tensor  # [rank, out_features of the part]
    scale: float


def part_of(found: re.Match[str]) -> str:
    """gate, up or down, from a match of EXPERT_TENSOR."""
    return _PARTS.get(found["name"], "down")


def stack_experts(target: Target, pairs: Sequence[ExpertFactors]) -> Factors:
    """Put the pairs of one layer together; experts and parts that are not there change nothing.

    Gate and up keep rank-1 terms of their own: the first rows are the gate's, whose B is zero in
    the up columns, and the others the up's. Lower ranks are filled with zeros to the largest. One
    scale for all: others are multiplied into B.
    """
    scale = next((pair.scale for pair in pairs if pair.scale), 1.0)
    dtype = pairs[0].a.dtype if all(p.scale == scale for p in pairs) else torch.float32
    parts = [p for p in ("gate", "up", "down") if any(pair.part == p for pair in pairs)]
    ranks = [max(len(pair.a) for pair in pairs if pair.part == part) for part in parts]
    shape = target.num_experts, sum(ranks)
    a = torch.zeros(*shape, target.in_features, dtype=dtype)
    b = torch.zeros(*shape, target.out_features, dtype=dtype)
    columns = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}
    for pair in pairs:
        begin = sum(ranks[: parts.index(pair.part)])
        rows = slice(begin, begin + len(pair.a))
        a[pair.index, rows] = pair.a.to(dtype)
        ratio = pair.scale / scale
        b[pair.index, rows, columns[pair.part]] = (pair.b if ratio == 1 else pair.b * ratio).to(
            dtype
        )
    return Factors(a, b, scale)
