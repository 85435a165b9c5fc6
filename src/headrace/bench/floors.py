"""The least time a step can take: bytes over bandwidth, or FLOPs over the matrix units' rate."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.models.config import GptOssConfig

BF16_BYTES = 2
MXFP4_BYTES = (4 + 8 / 32) / 8  # 32 values of 4 bits share a scale of 8


@dataclass(frozen=True)
class Gpu:
    """Rates measured on the card, not the data sheet's."""

    name: str
    bytes_per_s: float  # device-to-device copy, bytes read and written
    flops_per_s: float  # bf16 matmul 8192^3


GPUS = (Gpu("H100", 3.0e12, 790e12), Gpu("H200", 4.3e12, 790e12))


@dataclass(frozen=True)
class Work:
    """What an op must move at least, and compute."""

    bytes: float  # read once from memory: weights, keys and values; activations may stay on chip
    flops: float  # a multiply-add counts two

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor_s(self, gpu: Gpu) -> float:
        """Seconds: the longer one of moving the bytes and computing the FLOPs."""
        return max(self.bytes / gpu.bytes_per_s, self.flops / gpu.flops_per_s)


@dataclass(frozen=True)
class Step:
    """One forward: num_seqs sequences with query_len new tokens each, after context others."""

    num_seqs: int
    query_len: int  # 1: decode
    context: float  # tokens in the cache before, a mean

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return self.num_seqs * self.query_len


def find_gpu(device_name: str) -> Gpu | None:
    """The rates of a card by torch's name for it, or None for one that nobody has measured."""
    return next((gpu for gpu in GPUS if gpu.name in device_name), None)


def experts_hit(num_experts: int, top_k: int, num_tokens: float) -> float:
    """num_experts (1 - (1 - top_k / num_experts)^num_tokens): expected, if routing spreads."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def step_work(config: GptOssConfig, step: Step) -> dict[str, Work]:
    """Work of each op in one forward, all layers together; the last row of a sequence has logits.

    Weights are bf16 and experts MXFP4, each read once; keys and values are bf16.
    """
    hidden, tokens, layers = config.hidden_size, step.num_tokens, config.num_hidden_layers
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return {
        "qkv": _linear(tokens, hidden, q_width + 2 * kv_width, layers),
        "attention": _attention(config, step),
        "output": _linear(tokens, q_width, hidden, layers),
        "router": _linear(tokens, hidden, config.num_local_experts, layers),
        "gate_up": _experts(config, tokens, 2 * config.intermediate_size * hidden),
        "down": _experts(config, tokens, config.intermediate_size * hidden),
        "lm_head": _linear(step.num_seqs, hidden, config.vocab_size, 1),
    }


def lora_work(config: GptOssConfig, step: Step, num_adapters: int, rank: int) -> Work:
    """What adapters on attention and all experts add, all sequences spread evenly over them."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    dense = sum(hidden + width for width in (q_width, kv_width, kv_width, q_width))
    expert = hidden + 2 * inter + inter + hidden
    top_k, tokens = config.num_experts_per_tok, step.num_tokens
    in_use = min(num_adapters, step.num_seqs)
    hit = experts_hit(config.num_local_experts, top_k, tokens / max(in_use, 1))
    size = rank * config.num_hidden_layers
    return Work(
        in_use * (dense + hit * expert) * size * BF16_BYTES,
        2.0 * tokens * (dense + top_k * expert) * size * (in_use > 0),
    )


def total(work: dict[str, Work]) -> Work:
    """All ops together: the floor of a step is that of the sum."""
    return sum(work.values(), Work(0.0, 0.0))


def _linear(rows: int, in_features: int, out_features: int, count: int) -> Work:
    size = in_features * out_features * count
    return Work(size * BF16_BYTES, 2.0 * rows * size)


def _experts(config: GptOssConfig, num_tokens: int, size: int) -> Work:
    top_k, layers = config.num_experts_per_tok, config.num_hidden_layers
    hit = experts_hit(config.num_local_experts, top_k, num_tokens)
    return Work(hit * size * MXFP4_BYTES * layers, 2.0 * num_tokens * top_k * size * layers)


def _attention(config: GptOssConfig, step: Step) -> Work:
    """Keys and values of the window are read once a sequence; each query sees those before it."""
    kv_bytes = 2 * config.num_key_value_heads * config.head_dim * BF16_BYTES
    flops_per_key = 4.0 * config.num_attention_heads * config.head_dim  # q k^T, and p v
    work = Work(0.0, 0.0)
    for kind in config.layer_types:
        window = config.sliding_window if kind == "sliding_attention" else float("inf")
        keys = min(step.context + step.query_len, window + step.query_len - 1)
        # the queries of a chunk see context + 1, context + 2, ... keys, at most the window
        seen = _sum_to(step.context + step.query_len, window) - _sum_to(step.context, window)
        work += Work(step.num_seqs * keys * kv_bytes, step.num_seqs * seen * flops_per_key)
    return work


def _sum_to(n: float, most: float) -> float:
    """min(1, most) + min(2, most) + ... + min(n, most)."""
    if n <= most:
        return n * (n + 1) / 2
    return most * (most + 1) / 2 + (n - most) * most
