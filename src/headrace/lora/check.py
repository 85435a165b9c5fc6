"""The self-check of a load: does the device add what the file says?"""

from __future__ import annotations

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
from headrace.lora.upload import helpers
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
# Share of the largest value of a delta. In bfloat16 x A^T and y are rounded to 8 bits each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def check_adapter(weights: LoraWeights, sites: Sequence[Site], slot: int, adapter: Adapter) -> str:
    """Compare each target's delta for a random x with scale (x A^T) B in float64.

    Returns a line for the log. Raises ConfigError naming the target that is worst, if it is wrong.
    """
    errors: dict[str, float] = {}
    found: list[tuple[Tensor, Future[Tensor], LoraSite, Site]] = []
    for site, targets in zip(sites_of(weights), sites, strict=True):
        factors = [adapter.factors.get(t.key) for t in targets.targets]
        if any(factors):
            trial = try_site(site, weights, slot)
            expected = helpers().submit(expected_deltas, trial, factors, site.widths)
            found.append((trial.got, expected, site, targets))  # meanwhile the device goes on
    for got, expected, site, targets in found:
        errors |= errors_of(got, expected.result(), targets, site.widths)
    worst = max(errors, key=lambda key: errors[key])
    tolerance = TOLERANCE[weights.memory.dtype]
    text = f"self-check of {len(errors)} targets: largest error {errors[worst]:.1e} of a delta"
    if not errors[worst] <= tolerance:
        raise ConfigError(f"{text}, above {tolerance:.0e}, in {worst} of {adapter.path}")
    return text


def dry_run(weights: LoraWeights) -> None:
    """Launch what checks launch, for whoever compiles kernels before they are needed."""
    kinds = {(s.in_features, s.widths, s.num_experts): s for s in sites_of(weights)}
    for site in kinds.values():
        try_site(site, weights, slot=0)


def sites_of(weights: LoraWeights) -> list[LoraSite]:
    """In the order of `headrace.lora.targets.model_sites`."""
    layers = (site for layer in weights.layers for site in vars(layer).values())
    return [weights.embedding, *layers, weights.lm_head]


@dataclass(frozen=True)
class Trial:
    """What a site's ops got, and what they added to zeros."""

    x: Tensor  # [ROWS, in_features]; of the embedding, [ROWS] tokens
    experts: Tensor  # [ROWS]
    got: Tensor  # [ROWS, sum(widths)] float64


def try_site(site: LoraSite, weights: LoraWeights, slot: int) -> Trial:
    """Run the ops for a random x, on the current stream."""
    memory = weights.memory
    device, dtype = memory.device, memory.dtype
    generator = torch.Generator().manual_seed(sum(site.widths))
    slots = np.array([slot] * (ROWS - 1) + [-1], dtype=np.int32)
    arrays = row_arrays(slots, site.rank.shape[1])
    rows = LoraRows(*(torch.from_numpy(array).to(device) for array in arrays))
    # logits are float32
    y_dtype = torch.float32 if site is weights.lm_head else dtype
    y = torch.zeros(ROWS, sum(site.widths), dtype=y_dtype, device=device)
    # sized as in a step: other sizes would be other kernels
    parts = own_parts(site, ROWS, device, weights.max_rank) if dispatch.takes_kernel(y) else None
    experts = torch.randint(site.num_experts, (ROWS,), generator=generator)
    if site is weights.embedding:
        x = torch.randint(site.in_features, (ROWS,), generator=generator)
        add_lora_embedding(y, x.to(device), site, memory, rows, parts)
    else:
        x = torch.randn(ROWS, site.in_features, generator=generator).to(dtype)
        on_device = x.to(device)
        if site.num_experts > 1:
            where = experts.to(device), rows.slot_of_row
            add_expert_lora(y, on_device, *where, site, memory, parts)
        else:
            add_lora(y, on_device, site, memory, rows, parts)
    return Trial(x, experts, y.double().cpu())


def expected_deltas(
    trial: Trial,
    factors: Sequence[Factors | None],  # of each segment
    widths: Sequence[int],
) -> Tensor:
    """scale (x A_e^T) B_e in float64, and 0 for the last row."""
    expected = trial.got.new_zeros(ROWS, sum(widths))
    for f, part in zip(factors, expected.split(list(widths), 1), strict=True):
        if f is None:
            continue
        for expert in trial.experts[: ROWS - 1].unique().tolist():
            rows = (trial.experts == expert).nonzero().flatten()
            x, a, b = trial.x[rows], f.a[expert], f.b[expert]
            shrunk = x.double() @ a.double().T if x.ndim > 1 else a[:, x].double().T
            part[rows] = shrunk @ b.double() * f.scale
    expected[ROWS - 1] = 0
    return expected


def errors_of(
    got: Tensor, expected: Tensor, targets: Site, widths: Sequence[int]
) -> dict[str, float]:
    """The largest error of each target, as a share of its largest value."""
    parts = zip(targets.targets, got.split(widths, 1), expected.split(widths, 1), strict=True)
    errors = {t.key: (g - e).abs().max() / e.abs().max().clamp(min=1e-30) for t, g, e in parts}
    # NaN would be neither above the tolerance nor above another error
    return {key: error.nan_to_num(nan=torch.inf).item() for key, error in errors.items()}
