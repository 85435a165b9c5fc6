"""Paged attention with sinks and sliding windows, for prefill chunks and decode rows alike."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.ops import dispatch
from headrace.ops.attention_plan import AttentionPlan

_ROWS_AT_ONCE = 128  # queries scored together: bounds the scores, and the keys a window needs


def paged_attention(
    q: Tensor,  # [num_tokens, num_heads, head_dim]
    kv_cache: Tensor,  # [2 (k, v), num_pages, block_size, num_kv_heads, head_dim]
    block_table: Tensor,  # [num_seqs, max_blocks] int32; -1 = page freed or not yet given
    query_start: Tensor,  # [num_seqs + 1] int32
    seq_lens: Tensor,  # [num_seqs] int32
    sinks: Tensor,  # [num_heads]: a logit of each head that takes probability but has no value
    window: int,  # tokens a query sees including itself; 0 = all
    scale: float,
    plan: AttentionPlan | None = None,  # filled from the same query_start and seq_lens
    out: Tensor | None = None,  # [num_tokens, num_heads, head_dim] in q's dtype
) -> Tensor:
    """out_i = sum_j exp(s_ij) v_j / (exp(sink) + sum_j exp(s_ij)) with s_ij = scale q_i . k_j.

    The query at position i sees keys j with i - window < j <= i. Sequence s owns the rows
    query_start[s]:query_start[s + 1], the last ones of its seq_lens[s] tokens, whose keys are in
    the cache already. Pages outside every query's window are not read. Computes in float32.
    CUDA tensors need a plan and take the lengths from it; a row's bits depend on its own position
    and keys only. On the CPU the plan is not used. Returns out.

    Raises:
        ValueError: no plan for CUDA tensors, or one for another window; what the kernel refuses.
    """
    out = torch.empty_like(q) if out is None else out
    if dispatch.takes_kernel(q):
        # Triton may be missing where there is no GPU
        from headrace.ops import attention_kernel

        if plan is None or plan.window != window:
            found = plan and f"made for window {plan.window}"
            raise ValueError(f"plan is {found}; CUDA tensors need one made for window {window}")
        return attention_kernel.paged_attention(q, kv_cache, block_table, sinks, scale, plan, out)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for seq, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        first_position = length - (end - begin)
        for row in range(begin, end, _ROWS_AT_ONCE):
            rows = slice(row, min(row + _ROWS_AT_ONCE, end))
            position = first_position + row - begin
            last = position + rows.stop - rows.start
            first_key = max(0, position - window + 1) if window else 0
            k, v = _gather(kv_cache, block_table[seq], first_key, last)
            out[rows] = _attend(q[rows], k, v, sinks, position - first_key, window, scale)
    return out


def _gather(kv_cache: Tensor, pages: Tensor, first_key: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values at positions first_key:end, each [keys, num_kv_heads, head_dim]."""
    block_size = kv_cache.shape[2]
    first_block = first_key // block_size
    used = pages[first_block : (end - 1) // block_size + 1]
    tokens = kv_cache[:, used].flatten(1, 2)
    offset = first_block * block_size
    k, v = tokens[:, first_key - offset : end - offset].float()
    return k, v


def _attend(
    q: Tensor,  # [rows, num_heads, head_dim]
    k: Tensor,  # [keys, num_kv_heads, head_dim]
    v: Tensor,  # [keys, num_kv_heads, head_dim]
    sinks: Tensor,  # [num_heads]
    first_row: int,  # index among the keys of the first query's own key
    window: int,
    scale: float,
) -> Tensor:
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    # head h of the queries shares the keys of head h // (num_heads / num_kv_heads)
    grouped = q.float().view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = grouped.flatten(1, 2) @ k.permute(1, 2, 0) * scale
    scores = scores.view(num_heads, num_rows, -1)
    if num_rows > 1:
        own = torch.arange(first_row, first_row + num_rows, device=q.device).unsqueeze(-1)
        key = torch.arange(len(k), device=q.device)
        hidden = key > own
        if window:
            hidden |= key <= own - window
        scores = scores.masked_fill(hidden, -torch.inf)
    sink = sinks.float().view(-1, 1, 1).expand(-1, num_rows, 1)
    weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    out = weights.reshape(num_kv_heads, -1, len(k)) @ v.transpose(0, 1)
    return out.view(num_heads, num_rows, head_dim).transpose(0, 1).to(q.dtype)
