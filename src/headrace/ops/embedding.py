"""The first op of a step: rows of the embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.ops import dispatch


def embed(
    token_ids: Tensor,  # [num_tokens] int64; -1 - i: sampled[i]
    embedding: Tensor,  # [vocab_size, hidden]
    sampled: Tensor | None = None,  # [max_num_seqs] int64; None: every id is known
    out: Tensor | None = None,  # [num_tokens, hidden]
) -> Tensor:
    """y[t] = embedding[id of t], where the id may be a token that the host has not read yet.

    Returns out, or a new tensor [num_tokens, hidden] of embedding's dtype.
    """
    if out is None:
        out = embedding.new_empty(len(token_ids), embedding.shape[1])
    if dispatch.takes_kernel(token_ids):
        from headrace.ops import embedding_kernel

        return embedding_kernel.embed(token_ids, embedding, sampled, out)
    return torch.index_select(embedding, 0, known(token_ids, sampled), out=out)


def known(token_ids: Tensor, sampled: Tensor | None) -> Tensor:
    """The ids with every -1 - i replaced by sampled[i], [num_tokens] int64."""
    if sampled is None:
        return token_ids
    return torch.where(token_ids < 0, sampled[(-1 - token_ids).clamp_min(0)], token_ids)
