"""Root-mean-square normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from headrace.ops import dispatch
from headrace.ops.checks import check_rows


@dataclass(frozen=True)
class NextNorm:
    """out = rms_norm(h), for an op that computes h and can do this along with it."""

    weight: Tensor  # [hidden]
    eps: float
    out: Tensor  # [num_tokens, hidden]

    def check(self, h: Tensor) -> None:
        """Raise ValueError where the shapes do not fit."""
        check(h, self.weight, self.out)


def rms_norm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [num_tokens or num_rows, hidden]; may be x where rows is None
    rows: Tensor | None = None,  # [num_rows] int64: of x, the ones wanted; None: all
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight of x = x[rows], in float32, rounded once.

    Returns out, or a new tensor of x's dtype. Raises ValueError where the shapes do not fit.
    """
    if dispatch.takes_kernel(x):
        from headrace.ops import norm_kernel

        if out is None:
            out = x.new_empty(len(x) if rows is None else len(rows), *x.shape[1:])
        return norm_kernel.rms_norm(x, weight, eps, out, rows)
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x needs {(x.shape[-1],)}")
    x = x if rows is None else x[rows]
    y = F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return y if out is None else out.copy_(y)


def check(x: Tensor, weight: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
    """Raise ValueError, naming the argument, where one does not fit the others."""
    check_rows(x)
    if tuple(weight.shape) != (x.shape[1],) or not weight.is_contiguous():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x needs ({x.shape[1]},)")
    shape = (len(x) if rows is None else len(rows), x.shape[1])
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(
            f"out has shape {tuple(out.shape)}, strides {out.stride()}; pass contiguous {shape}"
        )
