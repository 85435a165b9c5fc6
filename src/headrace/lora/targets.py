"""What of a gpt-oss model an adapter can change, and in which order the tables list it."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.models.config import GptOssConfig

EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Target:
    """One matmul of the checkpoint. key is what PEFT's patterns are matched against."""

    key: str
    in_features: int
    out_features: int
    num_experts: int = 1  # 1: dense

    @property
    def is_module(self) -> bool:
        """Whether PEFT finds it as a module; the experts' and the router's are parameters."""
        return self.num_experts == 1 and not self.key.endswith(".weight")


@dataclass(frozen=True)
class Site:
    """Targets that are one matmul of ours, side by side in its output."""

    targets: tuple[Target, ...]


def model_sites(config: GptOssConfig) -> tuple[Site, ...]:
    """The embedding, the five sites of each layer in the order of LoraLayer, the LM head."""
    hidden, vocab = config.hidden_size, config.vocab_size
    layers = [site for i in range(config.num_hidden_layers) for site in _layer_sites(config, i)]
    embedding = Target(EMBEDDING, vocab, hidden)
    return Site((embedding,)), *layers, Site((Target(LM_HEAD, hidden, vocab),))


def _layer_sites(config: GptOssConfig, layer: int) -> tuple[Site, ...]:
    hidden, inter, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    attention = f"model.layers.{layer}.self_attn"
    mlp = f"model.layers.{layer}.mlp"
    return (
        Site(
            (
                Target(f"{attention}.q_proj", hidden, q_width),
                Target(f"{attention}.k_proj", hidden, kv_width),
                Target(f"{attention}.v_proj", hidden, kv_width),
            )
        ),
        Site((Target(f"{attention}.o_proj", q_width, hidden),)),
        Site((Target(f"{mlp}.router.weight", hidden, experts),)),
        Site((Target(f"{mlp}.experts.gate_up_proj", hidden, 2 * inter, experts),)),
        Site((Target(f"{mlp}.experts.down_proj", inter, hidden, experts),)),
    )
