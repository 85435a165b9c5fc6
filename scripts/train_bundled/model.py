"""gpt-oss for training: a pure function of named parameters, as a checkpoint names them.

Parameters are transformed before use (quantized, merged with an adapter) by mapping the dict, so
that one forward serves the base, quantization-aware training and adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from dataset import Rows
from torch import Tensor

from headrace.ops import mxfp4

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The bundled model's sizes."""

    vocab_size: int = 3072
    hidden: int = 256
    inter: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    top_k: int = 2
    window: int = 128
    rope_theta: float = 10000.0
    yarn_factor: float = 8.0
    original_context: int = 512
    eos: list[int] = field(default_factory=list)  # return, endoftext, call

    def config(self) -> dict[str, object]:
        """config.json."""
        kinds = ("sliding_attention", "full_attention")
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.inter,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "experts_per_token": self.top_k,
            "sliding_window": self.window,
            "layer_types": [kinds[i % 2] for i in range(self.num_layers)],
            "max_position_embeddings": int(self.original_context * self.yarn_factor),
            "initial_context_length": self.original_context,
            "rope_theta": self.rope_theta,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": self.yarn_factor,
                "original_max_position_embeddings": self.original_context,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "swiglu_limit": 7.0,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": False,
            "use_cache": True,
            "eos_token_id": self.eos[0],
            "pad_token_id": self.eos[1],
            "dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
        }


def init_params(shape: Shape, seed: int) -> Params:
    """Normal weights of deviation 1/sqrt(fan in), zero biases, unit norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, fan_in: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator) * gain * fan_in**-0.5

    hidden, inter, experts = shape.hidden, shape.inter, shape.num_experts
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    out_gain = (2 * shape.num_layers) ** -0.5
    params = {
        "model.embed_tokens.weight": normal(shape.vocab_size, hidden, fan_in=4),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(shape.vocab_size, hidden, fan_in=hidden),
    }
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}."
        for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            params[f"{layer}self_attn.{name}_proj.weight"] = normal(width, hidden, fan_in=hidden)
            params[f"{layer}self_attn.{name}_proj.bias"] = torch.zeros(width)
        params |= {
            f"{layer}self_attn.o_proj.weight": normal(
                hidden, q_width, fan_in=q_width, gain=out_gain
            ),
            f"{layer}self_attn.o_proj.bias": torch.zeros(hidden),
            f"{layer}self_attn.sinks": torch.zeros(shape.num_heads),
            f"{layer}input_layernorm.weight": torch.ones(hidden),
            f"{layer}post_attention_layernorm.weight": torch.ones(hidden),
            f"{layer}mlp.router.weight": normal(experts, hidden, fan_in=hidden),
            f"{layer}mlp.router.bias": torch.zeros(experts),
            f"{layer}mlp.experts.gate_up_proj": normal(experts, hidden, 2 * inter, fan_in=hidden),
            f"{layer}mlp.experts.gate_up_proj_bias": torch.zeros(experts, 2 * inter),
            f"{layer}mlp.experts.down_proj": normal(
                experts, inter, hidden, fan_in=inter, gain=out_gain
            ),
            f"{layer}mlp.experts.down_proj_bias": torch.zeros(experts, hidden),
        }
    return params


def is_expert_weight(name: str) -> bool:
    """Whether MXFP4 holds this parameter."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def fake_quantize(params: Params) -> Params:
    """Expert weights as MXFP4 will give them back, with the gradient passed straight through."""

    def rounded(weight: Tensor) -> Tensor:
        with torch.no_grad():
            stored = mxfp4.quantize(weight.transpose(1, 2).to(torch.bfloat16))
            exact = mxfp4.dequantize(*stored, torch.float32).transpose(1, 2)
        return weight + (exact - weight).detach()

    return {n: rounded(p) if is_expert_weight(n) else p for n, p in params.items()}


def rope_tables(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """YaRN's cos and sin, [..., 1, head_dim / 2], scaled by its attention factor."""
    dim, theta, factor = shape.head_dim, shape.rope_theta, shape.yarn_factor
    index = torch.arange(dim // 2, device=positions.device, dtype=torch.float32)
    base = theta ** (-2 * index / dim)

    def bound(rotations: float) -> float:
        turns = shape.original_context / (rotations * 2 * math.pi)
        return min(max(dim * math.log(turns) / (2 * math.log(theta)), 0.0), dim - 1.0)

    low, high = bound(32.0), bound(1.0)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    angle = positions.float()[..., None, None] * (base / factor * ramp + base * (1 - ramp))
    scale = 0.1 * math.log(factor) + 1
    return angle.cos() * scale, angle.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Selects rows by a matmul: the gradient of indexing is slow where many rows are the same."""
    hot = torch.zeros(*index.shape, size, dtype=dtype, device=index.device)
    return hot.scatter_(-1, index[..., None], 1.0)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), 1e-5).to(x.dtype)


def masks(positions: Tensor, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sliding, full): 0 or -inf, [rows, 1, length, length + 8]; column 0 of the 8 is the sink."""
    length = positions.shape[1]
    document = (positions == 0).cumsum(1)
    row = torch.arange(length, device=positions.device)
    distance = row[:, None] - row[None, :]
    full = (document[:, :, None] == document[:, None, :]) & (distance >= 0)
    extra = (torch.arange(8, device=positions.device) == 0).expand(*positions.shape, 8)

    def additive(allowed: Tensor) -> Tensor:
        keep = torch.cat((allowed, extra), dim=-1)[:, None]
        return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(
            ~keep, float("-inf")
        )

    return additive(full & (distance < window)), additive(full)


def attention(p: Params, x: Tensor, shape: Shape, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """Attention with a sink: one more key whose score is the sink's logit and whose value is 0.

    Queries get one more coordinate, of value 1, that only the sink's key answers to.
    """
    rows, length, dtype, dim = x.shape[0], x.shape[1], x.dtype, shape.head_dim

    def heads(name: str) -> Tensor:
        weight, bias = p[f"self_attn.{name}_proj.weight"], p[f"self_attn.{name}_proj.bias"]
        return F.linear(x, weight.to(dtype), bias.to(dtype)).unflatten(-1, (-1, dim))

    group = shape.num_heads // shape.num_kv_heads
    q, k, v = rotate(heads("q"), cos, sin), rotate(heads("k"), cos, sin), heads("v")
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    q = torch.cat((q, q.new_ones(*q.shape[:3], 1), q.new_zeros(*q.shape[:3], 7)), dim=-1)
    scale = dim**-0.5
    sink = F.pad((p["self_attn.sinks"] / scale).to(dtype)[:, None], (dim, 7))  # [heads, dim + 8]
    k = torch.cat((F.pad(k, (0, 8)), F.pad(sink.expand(rows, 1, -1, -1), (0, 0, 0, 0, 0, 7))), 1)
    v = F.pad(v, (0, 8, 0, 0, 0, 8))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = mask.expand(-1, shape.num_heads, -1, -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :dim]
    y = y.transpose(1, 2).reshape(rows, length, -1)
    return F.linear(y, p["self_attn.o_proj.weight"].to(dtype), p["self_attn.o_proj.bias"].to(dtype))


def experts(p: Params, x: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """(output, balance loss, share of the choices that each expert got) of flat rows x."""
    dtype, k = x.dtype, shape.top_k
    logits = F.linear(x, p["mlp.router.weight"].to(dtype), p["mlp.router.bias"].to(dtype)).float()
    top, chosen = logits.topk(k, dim=-1)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=shape.num_experts)
    ends = counts.cumsum(0).to(torch.int32)
    expert_of = chosen.flatten()[order]

    def grouped(rows: Tensor, name: str) -> Tensor:
        weight, bias = p[f"mlp.experts.{name}"].to(dtype), p[f"mlp.experts.{name}_bias"].to(dtype)
        return F.grouped_mm(rows, weight, offs=ends) + one_hot(expert_of, len(bias), dtype) @ bias

    gate_up = grouped(x.index_select(0, order // k), "gate_up_proj")
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    out = grouped(inner, "down_proj")
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    weights = top.softmax(-1).to(dtype)
    y = (out.index_select(0, back).unflatten(0, (-1, k)) * weights[..., None]).sum(1)
    share = counts / chosen.numel()
    balance = shape.num_experts * (share * logits.softmax(-1).mean(0)).sum()
    return y, balance, share


def forward(
    params: Params,
    shape: Shape,
    rows: Rows,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states after the last norm, balance loss, expert shares [layers, experts])."""
    positions = rows.positions.long()
    embedding = params["model.embed_tokens.weight"].to(dtype)
    x = one_hot(rows.tokens.long(), len(embedding), dtype) @ embedding
    cos, sin = rope_tables(shape, positions)
    kinds = masks(positions, shape.window, dtype)
    balance, shares = x.new_zeros((), dtype=torch.float32), []
    for i in range(shape.num_layers):
        prefix = f"model.layers.{i}."
        p = {n.removeprefix(prefix): t for n, t in params.items() if n.startswith(prefix)}
        h = norm(x, p["input_layernorm.weight"])
        x = x + attention(p, h, shape, cos, sin, kinds[i % 2])
        h = norm(x, p["post_attention_layernorm.weight"])
        y, loss, share = experts(p, h.flatten(0, 1), shape)
        x, balance = x + y.view_as(x), balance + loss / shape.num_layers
        shares.append(share)
    return norm(x, params["model.norm.weight"]), balance, torch.stack(shares)


def reply_logits(params: Params, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, targets, mask) of the places whose next token belongs to a reply."""
    wanted = rows.learned[:, 1:]
    logits = F.linear(hidden[:, :-1][wanted], params["lm_head.weight"].to(hidden.dtype))
    return logits.float(), rows.tokens[:, 1:][wanted].long(), wanted
