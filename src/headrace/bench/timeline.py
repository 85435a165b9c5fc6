"""What a trace of the GPU says: whose time it was, and when nothing ran.

Kernels may overlap (one is launched before the one before it has ended), so a kernel's time is what
it adds: up to its end, from its start or from the end of all that started before it, whichever is
later. These times and the idle ones add up to the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """One kernel, or one copy, as it ran."""

    name: str
    start: float  # us
    end: float


@dataclass(frozen=True)
class Busy:
    """A kernel's part of a step."""

    name: str
    added_us: float


@dataclass(frozen=True)
class Step:
    """One step from its first kernel to the first of the next, or to the end of its own last."""

    kernels: list[Busy]  # as they started
    between_kernels_us: float  # nothing ran, though the step wasn't over
    between_steps_us: float  # nothing ran until the next step

    @property
    def us(self) -> float:
        """The whole."""
        busy = sum(k.added_us for k in self.kernels)
        return busy + self.between_kernels_us + self.between_steps_us


def split_steps(spans: Sequence[Span], num_steps: int) -> list[Step]:
    """Cut a trace of num_steps like steps; the last is left out, for nobody knows when it is over.

    A step begins with the first kernel whose name occurs equally often in all of them. Raises
    ValueError if there is none.
    """
    ordered = sorted(spans, key=lambda span: span.start)
    counts = Counter(span.name for span in ordered)
    first = next((s.name for s in ordered if counts[s.name] % num_steps == 0), None)
    if first is None:
        raise ValueError(f"no kernel of {dict(counts)} ran equally often in {num_steps} steps")
    places = [i for i, span in enumerate(ordered) if span.name == first]
    begins = places[:: counts[first] // num_steps]
    return [one_step(ordered[i:j], until=ordered[j].start) for i, j in pairwise(begins)]


def one_step(spans: Sequence[Span], until: float | None = None) -> Step:
    """A step of these kernels, in the order of their starts; the next begins at `until`."""
    kernels: list[Busy] = []
    idle, frontier = 0.0, spans[0].start
    for span in spans:
        idle += max(span.start - frontier, 0.0)
        kernels.append(Busy(span.name, max(span.end - max(frontier, span.start), 0.0)))
        frontier = max(frontier, span.end)
    return Step(kernels, idle, max(until - frontier, 0.0) if until is not None else 0.0)


def name_ops(
    kernels: Sequence[Busy],
    ops_of_layer: Mapping[str, Sequence[str]],
    num_layers: int,
    last_op: Mapping[str, str],
) -> list[Busy]:
    """Add the op to the names of kernels that serve several: "linear_kernel qkv".

    ops_of_layer: which ops a kernel of that name is in a layer, in their order; last_op: which one
    it is after the layers. A name that occurs another number of times stays as it is.
    """
    counts = Counter(kernel.name for kernel in kernels)
    sequence = {
        name: [*ops] * num_layers + [op for last, op in last_op.items() if last == name]
        for name, ops in ops_of_layer.items()
    }
    seen: Counter[str] = Counter()
    named = []
    for kernel in kernels:
        ops = sequence.get(kernel.name, [])
        if len(ops) == counts[kernel.name]:
            op = ops[seen[kernel.name]]
            seen[kernel.name] += 1
            kernel = Busy(f"{kernel.name} {op}", kernel.added_us)
        named.append(kernel)
    return named
