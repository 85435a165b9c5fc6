"""The forward with adapters against PEFT on transformers, in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.files import BUNDLED_MODEL
from headrace.lora.check import expected_deltas, make_trial, rows_of_slot, try_site
from headrace.models import Model, load_model
from headrace.ops import dispatch
from tests.checkpoints import random_checkpoint
from tests.lora.adapted import AdaptedModel, read
from tests.lora.peft_adapters import (
    ATTENTION,
    EXPERTS,
    loaded_by_peft,
    peft_logits,
    peft_model,
    save,
)
from tests.lora.random_adapters import random_adapter
from tests.models.half import in_half
from tests.paged import PagedSequences, logits_of

TOLERANCE = 2e-4  # logits have a deviation of 2
TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()

VARIANTS: dict[str, dict[str, Any]] = {
    "attention and experts": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "all there is": {
        "target_modules": [*ATTENTION, "embed_tokens", "lm_head"],
        "target_parameters": [*EXPERTS, "mlp.router.weight"],
    },
    "gate_up only, rsLoRA": {"target_parameters": EXPERTS[:1], "use_rslora": True},
    "down only, rank 1": {"target_parameters": EXPERTS[1:], "r": 1},
    "k and the router": {
        "target_modules": ["k_proj"],
        "target_parameters": ["mlp.router.weight"],
    },
    "rank and alpha patterns": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
        "rank_pattern": {"q_proj": 7, r".*layers\.1\.mlp\.experts\.down_proj": 3, "v_proj": 16},
        "alpha_pattern": {"o_proj": 3, "layers.0.mlp.experts.gate_up_proj": 20},
    },
    "one layer, one module excluded": {
        "target_modules": ATTENTION,
        "layers_to_transform": [1],
        "exclude_modules": ["v_proj"],
    },
    "all-linear": {"target_modules": "all-linear"},
    "q's weight as a parameter, which a module's pattern does not name": {
        "target_modules": ["k_proj"],
        "target_parameters": ["q_proj.weight"],
        "alpha_pattern": {"q_proj": 50},
    },
    "weights tied where they are not": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
    },
    "one layer, and the LM head by its whole name": {
        "target_modules": ["q_proj", "lm_head"],
        "layers_to_transform": [0],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # were inter hidden, down's tensors would not tell whether in and out are swapped
    return random_checkpoint(tmp_path_factory.mktemp("base"), seed=3, intermediate_size=96)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def directories(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters for one batch, the same variants as in the tests below."""
    found = []
    for i, name in enumerate(("all there is", "gate_up only, rsLoRA", "rank and alpha patterns")):
        wrapped = peft_model(checkpoint, i, **{"r": 4, "lora_alpha": 8} | VARIANTS[name])
        found.append(save(wrapped, tmp_path_factory.mktemp(f"adapter{i}")))
    return found


@torch.inference_mode()
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_peft(checkpoint: Path, model: Model, tmp_path: Path, name: str) -> None:
    wrapped = peft_model(checkpoint, 0, **{"r": 4, "lora_alpha": 8} | VARIANTS[name])
    adapter = read(model, save(wrapped, tmp_path))
    expected = peft_logits(wrapped, TOKENS)
    adapted = AdaptedModel(model, adapter)
    adapted.slot_of_seq = [0]
    assert adapter.warnings == ()
    assert (logits_of(adapted, TOKENS) - expected).abs().max() < TOLERANCE
    # and not because the adapter is small: neither the base nor another scale would pass
    assert (logits_of(model, TOKENS) - expected).abs().max() > 50 * TOLERANCE
    doubled = {k: replace(f, scale=2 * f.scale) for k, f in adapter.factors.items()}
    adapted = AdaptedModel(model, replace(adapter, factors=doubled))
    adapted.slot_of_seq = [0]
    assert (logits_of(adapted, TOKENS) - expected).abs().max() > 50 * TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("name", ["subtract", "reverse"])
def test_bundled_adapters_equal_peft(name: str) -> None:
    path = BUNDLED_MODEL.parent / "adapters" / name
    model = load_model(BUNDLED_MODEL)
    adapted = AdaptedModel(model, read(model, path))
    adapted.slot_of_seq = [0]
    expected = peft_logits(loaded_by_peft(BUNDLED_MODEL, path), TOKENS)
    assert (logits_of(adapted, TOKENS) - expected).abs().max() < TOLERANCE
    assert (logits_of(model, TOKENS) - expected).abs().max() > 50 * TOLERANCE


@torch.inference_mode()
def test_experts_that_peft_wrote_with_in_and_out_swapped(tmp_path: Path) -> None:
    """As beside transformers 4. The bundled model is as wide as its experts, like gpt-oss."""
    model = load_model(BUNDLED_MODEL)
    config: dict[str, Any] = {"is_transposed": False, "r": 4, "target_parameters": EXPERTS}
    wrapped = peft_model(BUNDLED_MODEL, 0, **config)
    adapter = read(model, save(wrapped, tmp_path / "both"))
    assert adapter.warnings == ()
    adapted = AdaptedModel(model, adapter)
    adapted.slot_of_seq = [0]
    expected = peft_logits(wrapped, TOKENS)
    assert (logits_of(adapted, TOKENS) - expected).abs().max() < TOLERANCE
    assert (logits_of(model, TOKENS) - expected).abs().max() > 50 * TOLERANCE
    # the shapes of down's tensors alone say nothing
    wrapped = peft_model(BUNDLED_MODEL, 0, **config | {"target_parameters": EXPERTS[1:]})
    [warning] = read(model, save(wrapped, tmp_path / "down")).warnings
    assert "would fit with in and out swapped, too" in warning


@torch.inference_mode()
def test_a_row_has_the_same_bits_beside_any_other_adapter(
    model: Model, directories: list[Path]
) -> None:
    adapted = AdaptedModel(model, *(read(model, path) for path in directories))
    alone = []
    for slot in (-1, 0, 1, 2):
        adapted.slot_of_seq = [slot]
        alone.append(logits_of(adapted, TOKENS))
    assert torch.equal(alone[0], logits_of(model, TOKENS))  # no adapter is no LoRA at all
    adapted.slot_of_seq = [2, -1, 0, -1, 1]
    together = PagedSequences(adapted, 5).step(dict.fromkeys(range(5), TOKENS))
    for logits, slot in zip(together.split(len(TOKENS)), adapted.slot_of_seq, strict=True):
        assert torch.equal(logits, alone[slot + 1])
    assert not torch.equal(alone[1], alone[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU only")
def test_the_kernels_add_what_the_reference_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step in Triton's interpreter: rows of an adapter on everything, and of none."""
    path = random_checkpoint(tmp_path, seed=1, num_hidden_layers=1, num_local_experts=3)
    exact, half = load_model(path), in_half(load_model(path, dtype="bfloat16"))
    adapter = read(exact, random_adapter(tmp_path / "adapter", path, 0, everything=True))
    found = []
    for model in (exact, half):
        adapted = AdaptedModel(model, adapter)
        adapted.slot_of_seq = [0, -1]
        rows = {0: TOKENS[:9], 1: TOKENS[9:12]}
        found.append(PagedSequences(adapted, 2, block_size=8).step(rows, [8, 11]).clone())
        monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    weights = adapted.memory.weights
    site = weights.layers[0].down  # the check's own kernels
    trial = make_trial(site, weights)
    added = try_site(site, weights, rows_of_slot(weights, 0), trial)
    factors = [adapter.factors["model.layers.0.mlp.experts.down_proj"]]
    expected, _ = expected_deltas(trial, factors, site.widths)
    assert (added - expected).abs().max() < 5e-3 * expected.abs().max()
    monkeypatch.undo()
    expected, got = found
    assert (got - expected).square().mean().sqrt() < 0.02 * expected.std()
    base = logits_of(exact, TOKENS[:9])[-1]
    assert (expected[0] - base).square().mean().sqrt() > 0.2 * expected.std()
