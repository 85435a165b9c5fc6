"""Device memory of the adapters: where each one's factors lie, and the tables that say so."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from headrace.lora.factors import Factors
from headrace.lora.targets import Site, Target
from headrace.lora.upload import Uploader
from headrace.ops.lora import ALIGNMENT, LoraLayer, LoraSite, LoraWeights

SITES_OF_LAYER = 5
SLOTS_ALIGNED = 4  # rows of the int32 tables begin at 16 bytes: kernels are compiled for that once

T = TypeVar("T")
Sizes = dict[str, int]  # key of a target -> elements of its factors in the memory


class Ranges:
    """Free ranges of a line of elements: first fit, and neighbours merge."""

    def __init__(self, size: int) -> None:
        self.free = [(0, size)] if size else []  # (begin, end), rising

    def take(self, size: int) -> int | None:
        """The begin of a range of its own for the caller; None if no free one is long enough."""
        for i, (begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        return None

    def give_back(self, begin: int, size: int) -> None:
        """Free a range that was taken."""
        end = begin + size
        i = bisect_left(self.free, (begin, end))
        if i < len(self.free) and self.free[i][0] == end:
            end = self.free.pop(i)[1]
        if i and self.free[i - 1][1] == begin:
            begin = self.free.pop(i - 1)[0]
            i -= 1
        self.free.insert(i, (begin, end))

    @property
    def num_free(self) -> int:
        """Elements that nobody holds."""
        return sum(end - begin for begin, end in self.free)


@dataclass(frozen=True)
class Placement:
    """Where the factors of one adapter lie: a range for each layer that it changes."""

    ranges: tuple[tuple[int, int], ...]  # (begin, size)
    a: dict[str, int]  # key of a target -> first element of A; B follows, aligned


class LoraMemory:
    """The flat memory, its ranges, and the tables by slot.

    Writing is safe beside running steps: place() and free() only keep the books, write() touches
    no range but the placement's, and publish() changes one slot's column of the tables.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        num_slots: int,
        max_rank: int,
        num_elements: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sites = tuple(sites)
        self.targets = {t.key: t for site in sites for t in site.targets}
        self.num_slots = num_slots
        self.ranges = Ranges(num_elements)
        self._segment = {key: i for i, key in enumerate(self.targets)}
        self._memory = torch.empty(num_elements, dtype=dtype, device=device)
        self._uploader = Uploader(device, largest_factor(self.targets.values(), max_rank))
        self._columns = -(-num_slots // SLOTS_ALIGNED) * SLOTS_ALIGNED
        self._tables = Tables.zeros(len(self.targets), self._columns, device)
        self.weights = self._weights(self._tables, max_rank)

    def place(self, sizes: Sizes) -> Placement | None:
        """Take room for an adapter with factors of these sizes, or nothing at all."""
        taken: list[tuple[int, int]] = []
        a: dict[str, int] = {}
        for keys in self._layers():
            size = sum(sizes.get(key, 0) for key in keys)
            begin = self.ranges.take(size) if size else 0
            if begin is None:
                for other in taken:
                    self.ranges.give_back(*other)
                return None
            if size:
                taken.append((begin, size))
            for key in keys:
                if key in sizes:
                    a[key] = begin
                    begin += sizes[key]
        return Placement(tuple(taken), a)

    def free(self, placement: Placement) -> None:
        """Give an adapter's ranges back."""
        for begin, size in placement.ranges:
            self.ranges.give_back(begin, size)

    def write(self, placement: Placement, factors: Mapping[str, Factors]) -> None:
        """Copy the factors into their ranges, on the current stream; for one thread at a time."""
        for key, f in factors.items():
            begin = placement.a[key]
            for source, start in ((f.a, begin), (f.b, begin + aligned(f.a.numel()))):
                target = self._memory[start : start + source.numel()].view(source.shape)
                # the device puts the elements in the order of the target
                target.copy_(self._uploader.upload(source))

    def publish(self, slot: int, placement: Placement, factors: Mapping[str, Factors]) -> None:
        """Let the steps launched from now on find the adapter at this slot."""
        self._tables.set_column(slot, self._column(placement, factors))

    def alone(self, slot: int, placement: Placement, factors: Mapping[str, Factors]) -> LoraWeights:
        """The weights with this adapter only, for a check before it is published."""
        tables = Tables.zeros(len(self.targets), self._columns, self._memory.device)
        tables.set_column(slot, self._column(placement, factors))
        return self._weights(tables, self.weights.max_rank)

    def _column(self, placement: Placement, factors: Mapping[str, Factors]) -> Tables:
        """The entries of one slot: [num_segments, 1] arrays."""
        column = Tables.zeros(len(self.targets), 1, torch.device("cpu"))
        # numpy's elements: a torch tensor's take milliseconds in all, of the thread of the steps
        a, b, rank, scale = (table.numpy() for table in vars(column).values())
        for key, f in factors.items():
            i = self._segment[key]
            a[i] = placement.a[key]
            b[i] = placement.a[key] + aligned(f.a.numel())
            rank[i] = f.rank
            scale[i] = f.scale
        return column

    def _layers(self) -> Iterator[list[str]]:
        """The keys that share a range: those of the embedding, of each layer, of the LM head."""
        groups = [self.sites[:1], *batched(self.sites[1:-1], SITES_OF_LAYER), self.sites[-1:]]
        for sites in groups:
            yield [t.key for site in sites for t in site.targets]

    def _weights(self, tables: Tables, max_rank: int) -> LoraWeights:
        sites = [self._site(tables, site.targets) for site in self.sites]
        return LoraWeights(
            memory=self._memory,
            embedding=sites[0],
            layers=tuple(LoraLayer(*five) for five in batched(sites[1:-1], SITES_OF_LAYER)),
            lm_head=sites[-1],
            max_rank=max_rank,
        )

    def _site(self, tables: Tables, targets: Sequence[Target]) -> LoraSite:
        first = self._segment[targets[0].key]
        rows = slice(first, first + len(targets))
        return LoraSite(
            in_features=targets[0].in_features,
            widths=tuple(t.out_features for t in targets),
            num_experts=targets[0].num_experts,
            a=tables.a[rows],
            b=tables.b[rows],
            rank=tables.rank[rows],
            scale=tables.scale[rows],
        )


@dataclass(frozen=True)
class Tables:
    """The entries of all segments; fields as in LoraSite, [num_segments, num_slots]."""

    a: Tensor
    b: Tensor
    rank: Tensor
    scale: Tensor

    @staticmethod
    def zeros(num_segments: int, num_slots: int, device: torch.device) -> Tables:
        """Slots that change nothing."""
        dtypes = (torch.int64, torch.int64, torch.int32, torch.float32)
        shape = num_segments, num_slots
        return Tables(*(torch.zeros(shape, dtype=dtype, device=device) for dtype in dtypes))

    def set_column(self, slot: int, column: Tables) -> None:
        """Replace the entries of one slot."""
        for name, values in vars(column).items():
            target = getattr(self, name)[:, slot : slot + 1]
            # from pinned memory, or the host would wait for the launched step
            source = values.pin_memory() if target.is_cuda else values
            target.copy_(source, non_blocking=True)


def sizes_of(factors: Mapping[str, Factors]) -> Sizes:
    """Elements that each target's factors take in the memory."""
    return {k: aligned(f.a.numel()) + aligned(f.b.numel()) for k, f in factors.items()}


def full_size(targets: Sequence[Target], rank: int) -> int:
    """Elements of an adapter that changes all of these targets at this rank."""
    rows = [(t.num_experts * rank, t.in_features, t.out_features) for t in targets]
    return sum(aligned(n * a) + aligned(n * b) for n, a, b in rows)


def largest_factor(targets: Iterable[Target], rank: int) -> int:
    """Bytes of the largest A or B of this rank, in float32."""
    return max(4 * t.num_experts * rank * max(t.in_features, t.out_features) for t in targets)


def aligned(num_elements: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Neighbours in groups of size."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
