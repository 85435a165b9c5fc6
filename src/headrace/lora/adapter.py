"""Reading an adapter: a PEFT directory whose every tensor is applied, or the load is refused."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.config import ConfigError
from headrace.files import read_json
from headrace.lora.factors import ExpertFactors, ExpertName, Factors, stack_experts
from headrace.lora.lease import Lease
from headrace.lora.peft_config import PeftConfig, parse_peft_config
from headrace.lora.targets import EMBEDDING, LM_HEAD, Target
from headrace.lora.threads import helpers

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
DTYPES = ("BF16", "F16", "F32")
SHOWN = 8  # problems in one message
ROWS_COMPARED = 4096  # at a time

BaseTensor = Callable[[str], Tensor]  # the base model's tensor of this name
Pair = dict[str, str]  # "A" and "B" -> name of the tensor in the file

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")
_BASE_COPY = re.compile(rf"({re.escape(EMBEDDING)}|{LM_HEAD})(\.base_layer)?\.weight")
_EXPERTS = re.compile(r"(.+\.experts)(\.base_layer)?")


class AdapterNotFoundError(ConfigError):
    """There is no adapter at a path."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, in CPU memory, by Target.key."""

    path: Path
    config: PeftConfig
    factors: dict[str, Factors]
    warnings: tuple[str, ...]
    lease: Lease | None = None  # of the file that the factors are mapped from

    @property
    def max_rank(self) -> int:
        """The largest rank of any target."""
        return max(factors.rank for factors in self.factors.values())

    def owned(self) -> Adapter:
        """A copy that the file's fate doesn't touch."""
        factors = {key: f.owned() for key, f in self.factors.items()}
        return replace(self, factors=factors, lease=None)


def read_adapter(
    path: Path,
    targets: Iterable[Target],
    base: BaseTensor,
    max_rank: int = 512,
) -> Adapter:
    """Read an adapter for a model with these targets. Its tensors are mapped from the file.

    Raises ConfigError naming every field or tensor that can't be applied, and the reason.
    """
    config = parse_peft_config(config_fields(path))
    by_key = {target.key: target for target in targets}
    try:
        lease = Lease(_tensors_file(path))
        try:
            factors, warnings = _read_tensors(path, config, by_key, base, max_rank)
        except BaseException:
            lease.end()  # the error may be kept, and what it saw with it
            raise
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path / TENSORS_NAME}: {error}") from error
    return Adapter(path, config, factors, warnings, lease)


def _read_tensors(
    path: Path, config: PeftConfig, targets: Mapping[str, Target], base: BaseTensor, max_rank: int
) -> tuple[dict[str, Factors], tuple[str, ...]]:
    """The factors, and what is odd about them."""
    with safe_open(path / TENSORS_NAME, framework="pt") as file:
        reader = _Reader(file, config, targets, base, max_rank)
        factors = reader.read()
    if reader.problems:
        shown = "; ".join(reader.problems[:SHOWN])
        more = f"; and {len(reader.problems) - SHOWN} more" if len(reader.problems) > SHOWN else ""
        raise ConfigError(f"adapter {path}: {shown}{more}")
    return factors, tuple(_warnings(config, factors, reader))


class _Reader:
    """One pass over a file's tensors; collects problems instead of stopping at the first."""

    def __init__(
        self,
        file: Any,
        config: PeftConfig,
        targets: Mapping[str, Target],
        base: BaseTensor,
        max_rank: int,
    ) -> None:
        self.targets = targets
        self.problems: list[str] = []
        self.applied: list[str] = []  # modules and parameters, by the names that PEFT has for them
        self.is_swapped = False  # the experts' in and out: see `_orientations`
        self.is_ambiguous = False
        self._file = file
        self._config = config
        self._base = base
        self._max_rank = max_rank
        self._read: dict[str, Tensor] = {}  # by name
        self._factors: dict[str, Factors] = {}
        self._experts: dict[str, list[ExpertFactors]] = defaultdict(list)  # by key of the target

    def read(self) -> dict[str, Factors]:
        """Account for every tensor."""
        pairs = self._pairs()
        orientations = set(self._orientations(pairs))
        self.is_swapped = (False, True) in orientations
        self.is_ambiguous = orientations == {(True, True)}
        for module, pair in pairs.items():
            if set(pair) == {"A", "B"}:
                if self._are_matrices(pair):
                    self._module(module, pair)
            else:
                [(side, name)] = pair.items()
                self._refuse(name, f"its partner lora_{'B' if side == 'A' else 'A'} is missing")
        self._refuse_nan()
        for key, experts in self._experts.items():
            if key in self._factors:
                self._refuse(
                    experts[0].tensor, f"{key} is also adapted by one tensor for all experts"
                )
            elif not self.problems:
                self._factors[key] = stack_experts(self.targets[key], experts)
                self._check_stacked(experts[0].tensor, self._factors[key].rank)
        if not self._factors and not self.problems:
            self.problems.append(f"{TENSORS_NAME} holds no LoRA tensors")
        return self._factors

    def _pairs(self) -> dict[str, Pair]:
        """Sort the file's tensors by module; copies of base tensors are compared and left out."""
        pairs: dict[str, Pair] = defaultdict(dict)
        for name in sorted(self._file.keys()):
            short = name.removeprefix("base_model.model.")
            dtype = self._file.get_slice(name).get_dtype()
            if dtype not in DTYPES:
                self._refuse(name, f"its dtype is {dtype}; it must be {', '.join(DTYPES)}")
            elif found := _FACTOR.fullmatch(short):
                module, embedding, side = found.group(1, 2, 3)
                if (module == EMBEDDING) != bool(embedding):
                    right = f"lora_embedding_{side}" if module == EMBEDDING else f"lora_{side}"
                    self._refuse(name, f"for this module the tensor must be named {right}")
                if side in pairs[module]:
                    self._refuse(name, f"{pairs[module][side]} means the same")
                pairs[module][side] = name
            elif found := _BASE_COPY.fullmatch(short):
                self._compare(name, f"{found[1]}.weight")
            else:
                self._refuse(name, "only lora_A and lora_B tensors can be applied")
        return pairs

    def _compare(self, name: str, base_name: str) -> None:
        """Refuse a copy of a base tensor that differs from it.

        PEFT saves the weights of an adapted embedding or LM head beside the factors.
        """
        base = self._base(base_name)
        copy = self._file.get_tensor(name)
        if copy.shape != base.shape or not all(
            # in parts, for on a GPU there is no room for a whole one
            torch.equal(part.to(own), own)
            for part, own in zip(copy.split(ROWS_COMPARED), base.split(ROWS_COMPARED), strict=True)
        ):
            self._refuse(name, f"it differs from the base model's {base_name}")

    def _module(self, module: str, pair: Pair) -> None:
        """Find what a module's pair changes, and add it to the factors."""
        expert = ExpertName.parse(module)
        if expert and expert.target_key in self.targets:
            self._one_expert(module, expert, pair)
        elif (layer := _EXPERTS.fullmatch(module)) and f"{layer[1]}.down_proj" in self.targets:
            self._all_experts(layer[1], pair)
        elif (target := self.targets.get(_dense_key(module))) and target.num_experts == 1:
            # patterns are matched with a parameter's own name, not with its module's
            weight = f"{module}.weight"
            is_parameter = weight == target.key or self._config.targets_parameter(weight)
            self._dense(weight if is_parameter else module, target, pair)
        else:
            self._refuse(pair["A"], "this model has no such module that can be adapted")

    def _dense(self, name: str, target: Target, pair: Pair) -> None:
        rank, shapes = self._rank(pair), self._shapes(pair)
        expected = (rank, target.in_features), (target.out_features, rank)
        if self._fits(pair, expected, shapes) and self._is_rank(name, rank, pair):
            a, b = self._tensors(pair)
            factors = Factors(a[None], b.T[None], self._config.scale(name, rank))
            self._add(target.key, name, pair, factors)

    def _orientations(self, pairs: Mapping[str, Pair]) -> Iterator[tuple[bool, bool]]:
        """Whether each pair for all experts of a layer fits as it is, and with in and out swapped.

        PEFT 0.19 and later write A as [.., out] and B as [in, ..] beside transformers 4, which
        don't tell them that gpt-oss's experts are transposed. A file is all one or the other, and
        where inter is hidden only gate_up tells which.
        """
        experts = [target for target in self.targets.values() if target.num_experts > 1]
        fitting = {(target.in_features, target.out_features) for target in experts}
        for module, pair in pairs.items():
            if _EXPERTS.fullmatch(module) and len(pair) == 2:
                a, b = self._shapes(pair)
                if len(a) == len(b) == 2:
                    yield (a[1], b[0]) in fitting, (b[0], a[1]) in fitting

    def _all_experts(self, experts: str, pair: Pair) -> None:
        """A is [num_experts * rank, in], B [out, rank * num_experts] with the expert fastest.

        PEFT names both parameters of the experts alike; their shapes tell them apart.
        """
        (rows, a_width), (b_width, columns) = self._shapes(pair)
        widths = (b_width, a_width) if self.is_swapped else (a_width, b_width)
        for proj in ("gate_up_proj", "down_proj"):
            target = self.targets[f"{experts}.{proj}"]
            if (target.in_features, target.out_features) == widths:
                break
        else:
            shapes = f"[{rows}, {a_width}] and [{b_width}, {columns}]"
            self._refuse(pair["A"], f"{shapes} fit neither gate_up_proj nor down_proj")
            return
        count = target.num_experts
        if rows != columns or rows % count:
            reason = f"its {rows} rows and lora_B's {columns} columns must be rank * {count}"
            self._refuse(pair["A"], reason)
        elif self._is_rank(target.key, rows // count, pair):
            rank = rows // count
            a, b = self._tensors(pair)
            a, b = a.view(count, rank, a_width), b.view(b_width, rank, count).permute(2, 1, 0)
            scale = self._config.scale(target.key, rank)
            factors = Factors(b, a, scale) if self.is_swapped else Factors(a, b, scale)
            self._add(target.key, target.key, pair, factors)

    def _one_expert(self, module: str, name: ExpertName, pair: Pair) -> None:
        tensor, key = pair["A"], name.target_key
        target = self.targets[key]
        rank, shapes = self._rank(pair), self._shapes(pair)
        out_features = target.out_features // (2 if name.part in ("gate", "up") else 1)
        expected = (rank, target.in_features), (out_features, rank)
        if name.index >= target.num_experts:
            self._refuse(tensor, f"this model has {target.num_experts} experts in a layer")
        elif any(other.name == name for other in self._experts[key]):
            self._refuse(tensor, "another tensor of the file adapts the same matrix")
        elif self._fits(pair, expected, shapes) and self._is_rank(module, rank, pair):
            a, b = self._tensors(pair)
            scale = self._config.scale(module, rank)
            self._experts[key].append(ExpertFactors(tensor, name, a, b.T, scale))
            self.applied.append(module)

    def _check_stacked(self, name: str, rank: int) -> None:
        """Refuse gate and up whose ranks, added up by `stack_experts`, are too large."""
        if rank > self._max_rank:
            reason = f"gate and up together have rank {rank}, above --max-lora-rank"
            self._refuse(name, f"{reason} {self._max_rank}")

    def _add(self, key: str, name: str, pair: Pair, factors: Factors) -> None:
        if key in self._factors:
            self._refuse(pair["A"], f"another tensor of the file adapts {key} already")
        self._factors[key] = factors
        self.applied.append(name)

    def _rank(self, pair: Pair) -> int:
        return int(self._file.get_slice(pair["A"]).get_shape()[0])

    def _shapes(self, pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        a, b = (tuple(self._file.get_slice(pair[s]).get_shape()) for s in "AB")
        return a, b

    def _are_matrices(self, pair: Pair) -> bool:
        bad = [
            (pair[side], list(shape))
            for side, shape in zip("AB", self._shapes(pair), strict=True)
            if len(shape) != 2 or 0 in shape
        ]
        for name, found in bad:
            self._refuse(name, f"its shape is {found}; it must be a matrix")
        return not bad

    def _fits(self, pair: Pair, expected: Iterable[Any], found: Iterable[Any]) -> bool:
        ok = True
        for side, want, have in zip("AB", expected, found, strict=True):
            if want != have:
                ok = False
                reason = f"its shape is {list(have)}; it must be {list(want)}"
                self._refuse(pair[side], reason)
        return ok

    def _is_rank(self, key: str, rank: int, pair: Pair) -> bool:
        """Whether the rank is what the config says, for the scale follows from it."""
        name, expected = pair["A"], self._config.rank(key)
        if rank != expected:
            self._refuse(name, f"its rank is {rank}, but {CONFIG_NAME} says {expected}")
        elif rank > self._max_rank:
            self._refuse(name, f"its rank is {rank}, above --max-lora-rank {self._max_rank}")
        return rank == expected and rank <= self._max_rank

    def _tensors(self, pair: Pair) -> tuple[Tensor, Tensor]:
        found = {pair[side]: self._file.get_tensor(pair[side]) for side in "AB"}
        self._read |= found
        a, b = found.values()
        return a, b

    def _refuse_nan(self) -> None:
        """Read every value, and so every page of the file: most of the time that a load takes."""
        found = list(helpers().map(torch.aminmax, self._read.values()))
        for name, ends in zip(self._read, found, strict=True):
            if not all(end.isfinite() for end in ends):
                self._refuse(name, "it holds NaN or infinity")

    def _refuse(self, name: str, reason: str) -> None:
        self.problems.append(f"tensor {name}: {reason}")


def _dense_key(module: str) -> str:
    """PEFT names the router's parameter by its module alone; Unsloth's is a linear layer."""
    return re.sub(r"\.mlp\.router(\.linear)?$", ".mlp.router.weight", module)


def config_fields(path: Path) -> dict[str, Any]:
    """The fields of adapter_config.json. Raises AdapterNotFoundError if there is no directory."""
    if not os.path.isdir(path):  # Path.is_dir raises for names that are too long
        raise AdapterNotFoundError(f"No adapter found for {path}: it is not a directory")
    return read_json(path / CONFIG_NAME)


def _tensors_file(path: Path) -> Path:
    file = path / TENSORS_NAME
    if not file.is_file():
        others = [f.name for f in path.glob("adapter_model.*")]
        advice = f"; convert {others[0]} to safetensors" if others else ""
        raise AdapterNotFoundError(f"No adapter found for {path}: it has no {TENSORS_NAME}{advice}")
    return file


def _warnings(config: PeftConfig, factors: Mapping[str, Factors], reader: _Reader) -> Iterator[str]:
    def is_named(key: str) -> bool:
        return config.targets_module(key) or config.targets_parameter(key)

    if reader.is_ambiguous:
        yield (
            "the experts' lora_A and lora_B would fit with in and out swapped, too: if PEFT 0.19 "
            "or later wrote them beside transformers 4, they are applied wrongly"
        )
    if all(f.is_zero() for f in factors.values()):
        yield "every delta is zero: the adapter changes nothing"
    if extra := sorted(name for name in reader.applied if not is_named(name)):
        yield f"applied though {CONFIG_NAME} does not target them: {_some(extra)}"
    missing = sorted(
        key
        for key, target in reader.targets.items()
        if key not in factors
        # PEFT takes no parameter for a module: a list with down_proj is meant for other models, too
        and (config.targets_parameter(key) or (target.is_module and config.targets_module(key)))
    )
    if missing:
        yield f"targeted by {CONFIG_NAME} but not in the file: {_some(missing)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
