# mypy: disable-error-code="no-untyped-def"
"""Rows of the embedding on the GPU, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def known_id(token_ids_ptr, sampled_ptr, token):
    """The id of a token, which may be one that the step before sampled."""
    token_id = tl.load(token_ids_ptr + token)
    if token_id < 0:
        token_id = tl.load(sampled_ptr - 1 - token_id)
    return token_id


@triton.jit
def embed_kernel(
    token_ids_ptr,  # [num_tokens] int64
    embedding_ptr,  # [vocab_size, hidden]
    sampled_ptr,  # [max_num_seqs] int64
    out_ptr,  # [num_tokens, hidden]
    hidden,
    BLOCK: tl.constexpr,
):
    """out[t] = embedding[id], id = sampled[-1 - token_ids[t]] where token_ids[t] < 0."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    token_id = known_id(token_ids_ptr, sampled_ptr, token)
    row = tl.load(embedding_ptr + token_id * hidden + column, mask=mask)
    tl.store(out_ptr + token * hidden + column, row, mask=mask)


def embed(token_ids: Tensor, embedding: Tensor, sampled: Tensor | None, out: Tensor) -> Tensor:
    """See `headrace.ops.embedding.embed`. Raises ValueError where the shapes do not fit."""
    shape = (len(token_ids), embedding.shape[1])
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)}; this call needs contiguous {shape}")
    if not embedding.is_contiguous():
        raise ValueError(f"embedding has strides {embedding.stride()}; pass it contiguous")
    if len(token_ids):
        embed_kernel[(len(token_ids),)](
            token_ids,
            embedding,
            token_ids if sampled is None else sampled,
            out,
            shape[1],
            BLOCK=triton.next_power_of_2(shape[1]),
        )
    return out
