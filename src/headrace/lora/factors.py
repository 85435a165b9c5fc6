"""The low-rank factors of one target, in the form that the kernels read."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.lora.targets import Target

# The names of PEFT and Mixtral, and those of Unsloth's lists of experts.
_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\."
    r"(?:(?P<index>[0-9]{1,6})\.(?P<name>gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"|(?P<list>gate_up_projs|down_projs)\.(?P<place>[0-9]{1,6}))"
)
_PARTS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
    **{"gate_up_projs": "gate_up", "down_projs": "down"},
}
_COLUMNS = {
    **{"gate": slice(0, None, 2), "up": slice(1, None, 2)},
    **{"gate_up": slice(None), "down": slice(None)},
}


@dataclass(frozen=True)
class ExpertName:
    """A module that is one matrix of one expert."""

    experts: str  # of the layer: ...mlp.experts
    index: int
    part: str  # gate, up, gate_up or down

    @staticmethod
    def parse(module: str) -> ExpertName | None:
        """From the module's name; None if it names something else."""
        found = _EXPERT.fullmatch(module)
        if found is None:
            return None
        part = _PARTS[found["name"] or found["list"]]
        return ExpertName(found["experts"], int(found["index"] or found["place"]), part)

    @property
    def target_key(self) -> str:
        """Of the matrices of all experts."""
        return f"{self.experts}.{'down' if self.part == 'down' else 'gate_up'}_proj"


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

    def owned(self) -> Factors:
        """A copy in memory of its own, in the same order of bytes."""
        return Factors(self.a.clone(), self.b.clone(), self.scale)

    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return not (self.a.any() and self.b.any() and self.scale)


@dataclass(frozen=True)
class ExpertFactors:
    """What a file of 2-D tensors holds for one matrix of one expert."""

    tensor: str  # name of lora_A
    name: ExpertName
    a: Tensor  # [rank, in_features]
    b: Tensor  # [rank, out_features of the part]
    scale: float


def stack_experts(target: Target, pairs: Sequence[ExpertFactors]) -> Factors:
    """Put the pairs of one layer together; experts and parts that are not there change nothing.

    Gate and up keep rank-1 terms of their own: the first rows are the gate's, whose B is zero in
    the up columns, and the others the up's. Lower ranks are filled with zeros to the largest. One
    scale for all: others are multiplied into B. The dtype holds the values of every pair.
    """
    scale = next((pair.scale for pair in pairs if pair.scale), 1.0)
    dtypes = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b)}
    if any(pair.scale != scale for pair in pairs):
        dtypes.add(torch.float32)
    dtype = functools.reduce(torch.promote_types, dtypes)
    parts = [p for p in _COLUMNS if any(pair.name.part == p for pair in pairs)]
    ranks = [max(len(pair.a) for pair in pairs if pair.name.part == part) for part in parts]
    shape = target.num_experts, sum(ranks)
    a = torch.zeros(*shape, target.in_features, dtype=dtype)
    b = torch.zeros(*shape, target.out_features, dtype=dtype)
    for pair in pairs:
        expert, part, ratio = pair.name.index, pair.name.part, pair.scale / scale
        begin = sum(ranks[: parts.index(part)])
        rows = slice(begin, begin + len(pair.a))
        values = pair.b.to(dtype)
        a[expert, rows] = pair.a.to(dtype)
        b[expert, rows, _COLUMNS[part]] = values if ratio == 1 else values * ratio
    return Factors(a, b, scale)
