"""The self-check of a load: does the device add what the file says?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.config import ConfigError
from headrace.lora.adapter import Adapter
from headrace.lora.factors import Factors
from headrace.lora.rows import row_arrays
from headrace.lora.targets import Site
from headrace.lora.threads import helpers
from headrace.ops import dispatch
from headrace.ops.lora import (
    LoraRows,
    LoraSite,
    LoraWeights,
    add_expert_lora,
    add_lora,
    add_lora_embedding,
    own_parts,
)

ROWS = 4  # the last one has no adapter, and must stay as it is
PAUSE = 0.001  # seconds without Python after each site, for the thread of the steps
Kind = tuple[object, ...]  # of site
# Share of a delta's size (`expected_deltas`). In bfloat16 x A^T and y are rounded to 8 bits each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def check_adapter(weights: LoraWeights, sites: Sequence[Site], slot: int, adapter: Adapter) -> str:
    """Compare each target's delta for a random x with scale (x A^T) B in float64.

    Returns a line for the log. Raises ConfigError naming the target that is worst, if it is wrong.
    """
    asked = []
    for site, targets in zip(sites_of(weights), sites, strict=True):
        factors = [adapter.factors.get(t.key) for t in targets.targets]
        if any(factors):
            asked.append((site, targets, factors))
    _finish_stream(weights)
    rows = rows_of_slot(weights, slot)
    trials = {kind: make_trial(site, weights) for kind, site in kinds_of(weights).items()}
    got: list[Tensor] = []
    expected: list[Future[tuple[Tensor, list[float]]]] = []
    for site, _, factors in asked:
        trial = trials[kind_of(site, weights)]
        got.append(try_site(site, weights, rows, trial))
        expected.append(helpers().submit(expected_deltas, trial, factors, site.widths))
        time.sleep(PAUSE)  # meanwhile the device goes on
    added = torch.cat([delta.flatten() for delta in got])
    _finish_stream(weights)
    errors: dict[str, float] = {}
    parts = added.cpu().split([delta.numel() for delta in got])
    for part, future, (site, targets, _) in zip(parts, expected, asked, strict=True):
        errors |= errors_of(part.view(ROWS, -1), *future.result(), targets, site.widths)
    worst = max(errors, key=lambda key: errors[key])
    tolerance = TOLERANCE[weights.memory.dtype]
    text = f"self-check of {len(errors)} targets: largest error {errors[worst]:.1e} of a delta"
    if not errors[worst] <= tolerance:
        raise ConfigError(f"{text}, above {tolerance:.0e}, in {worst} of {adapter.path}")
    return text


def _finish_stream(weights: LoraWeights) -> None:
    """Wait for the current stream.

    A copy to or from memory that is not pinned would do so, too, and hold up every launch of the
    process meanwhile: for 10 ms, when it waited for a check's kernels beside steps.
    """
    if weights.memory.is_cuda:
        torch.cuda.current_stream().synchronize()


def dry_run(weights: LoraWeights) -> None:
    """Launch what checks launch, for whoever compiles kernels before they are needed."""
    for site in kinds_of(weights).values():
        try_site(site, weights, rows_of_slot(weights, 0), make_trial(site, weights))


def sites_of(weights: LoraWeights) -> list[LoraSite]:
    """In the order of `headrace.lora.targets.model_sites`."""
    layers = (site for layer in weights.layers for site in vars(layer).values())
    return [weights.embedding, *layers, weights.lm_head]


def kind_of(site: LoraSite, weights: LoraWeights) -> Kind:
    """What a trial and its kernels depend on: sites of one kind share them."""
    ends = site is weights.embedding, site is weights.lm_head
    return (site.in_features, site.widths, site.num_experts, *ends)


def kinds_of(weights: LoraWeights) -> dict[Kind, LoraSite]:
    """One site of each kind."""
    return {kind_of(site, weights): site for site in sites_of(weights)}


def rows_of_slot(weights: LoraWeights, slot: int) -> LoraRows:
    """All rows but the last have the adapter."""
    slots = np.array([slot] * (ROWS - 1) + [-1], dtype=np.int32)
    arrays = row_arrays(slots, weights.lm_head.rank.shape[1])
    return LoraRows(*(torch.from_numpy(array).to(weights.memory.device) for array in arrays))


@dataclass(frozen=True)
class Trial:
    """What the ops of sites of one kind get; each on the host, then on the device."""

    x: tuple[Tensor, Tensor]  # [ROWS, in_features]; of the embedding, [ROWS] tokens
    experts: tuple[Tensor, Tensor]  # [ROWS]


def make_trial(site: LoraSite, weights: LoraWeights) -> Trial:
    """A random one, the same for each site of a kind."""
    device, dtype = weights.memory.device, weights.memory.dtype
    generator = torch.Generator().manual_seed(sum(site.widths))
    experts = torch.randint(site.num_experts, (ROWS,), generator=generator)
    if site is weights.embedding:
        x = torch.randint(site.in_features, (ROWS,), generator=generator)
    else:
        x = torch.randn(ROWS, site.in_features, generator=generator).to(dtype)
    return Trial((x, x.to(device)), (experts, experts.to(device)))


def try_site(site: LoraSite, weights: LoraWeights, rows: LoraRows, trial: Trial) -> Tensor:
    """What the ops add to zeros, on the current stream: [ROWS, sum(widths)] float64."""
    memory, x = weights.memory, trial.x[1]
    # logits are float32
    y_dtype = torch.float32 if site is weights.lm_head else memory.dtype
    y = torch.zeros(ROWS, sum(site.widths), dtype=y_dtype, device=memory.device)
    # sized as in a step: other sizes would be other kernels
    on_gpu = dispatch.takes_kernel(y)
    parts = own_parts(site, ROWS, memory.device, weights.max_rank) if on_gpu else None
    if site is weights.embedding:
        add_lora_embedding(y, x, site, memory, rows, parts)
    elif site.num_experts > 1:
        add_expert_lora(y, x, trial.experts[1], rows.slot_of_row, site, memory, parts)
    else:
        add_lora(y, x, site, memory, rows, parts)
    return y.double()


def expected_deltas(
    trial: Trial,
    factors: Sequence[Factors | None],  # of each segment
    widths: Sequence[int],
) -> tuple[Tensor, list[float]]:
    """scale (x A_e^T) B_e in float64, and 0 for the last row: [ROWS, sum(widths)]; and its sizes.

    A segment's size is its largest value, or the largest root of the sum of a value's squared
    terms: rounding errors grow with the terms, which after PEFT's orthogonal start add up to 0. For
    x A^T counts the larger of the two, too: at rank 1 it may be near 0 for every row.
    """
    x, experts = (on_host[: ROWS - 1] for on_host, _ in (trial.x, trial.experts))
    expected = torch.zeros(ROWS, sum(widths), dtype=torch.float64)
    sizes = [0.0] * len(widths)
    for i, (f, part) in enumerate(zip(factors, expected.split(list(widths), 1), strict=True)):
        if f is None:
            continue
        if len(f.a) > 1:  # all at once: each operation takes Python from the thread of the steps
            a, b, rows = f.a[experts].double(), f.b[experts].double(), x.double()[:, :, None]
            shrunk, terms = (a @ rows).mT, (a.square() @ rows.square()).mT
        elif x.ndim > 1:
            a, b, rows = f.a[0].double(), f.b[0].double(), x.double()
            shrunk, terms = rows @ a.T, rows.square() @ a.square().T
        else:
            shrunk, b = f.a[0][:, x].double().T, f.b[0].double()
            terms = shrunk.square()
        delta = shrunk @ b
        part[: ROWS - 1] = delta.view(ROWS - 1, -1) * f.scale
        terms = torch.maximum(terms, shrunk.square()) @ b.square_()
        squares = torch.maximum(delta.square(), terms)
        sizes[i] = abs(f.scale) * squares.max().sqrt().item()
    return expected, sizes


def errors_of(
    got: Tensor, expected: Tensor, sizes: Sequence[float], targets: Site, widths: Sequence[int]
) -> dict[str, float]:
    """The largest error of each target, as a share of its size."""
    differences = (got - expected).abs().split(widths, 1)
    parts = zip(targets.targets, differences, sizes, strict=True)
    errors = {t.key: part.max() / max(size, 1e-30) for t, part, size in parts}
    # NaN would be neither above the tolerance nor above another error
    return {key: error.nan_to_num(nan=torch.inf).item() for key, error in errors.items()}
