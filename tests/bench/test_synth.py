from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headrace.bench.random_files import PIECE_BYTES
from headrace.bench.synth import SIZES, write_synthetic
from headrace.bench.synth_tokenizer import special_ids, vocabulary
from headrace.config import ConfigError
from headrace.models import load_model
from headrace.models.config import parse_config
from headrace.models.gpt_oss_weights import tensor_shapes
from headrace.ops.routing import route
from headrace.server.tokenizer import Tokenizer, load_tokenizer
from tests.paged import logits_of

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "tiny"
    write_synthetic(path, TINY, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return load_tokenizer(tiny)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in path.glob("*.safetensors") for k, t in load_file(f).items()}


def test_the_sizes_are_those_of_the_public_models() -> None:
    sizes = {"20b": (24, 32, 13.76e9), "120b": (36, 128, 65.25e9)}
    for size, (layers, experts, num_bytes) in sizes.items():
        config = parse_config(SIZES[size])
        assert (config.num_hidden_layers, config.num_local_experts) == (layers, experts)
        shapes = tensor_shapes(config, is_mxfp4=True)
        found = sum(
            torch.Size(shape).numel() * (1 if name.endswith(("blocks", "scales")) else 2)
            for name, shape in shapes.items()
        )
        assert found == pytest.approx(num_bytes, rel=1e-3)


def test_same_seed_same_bytes_other_seed_others(tiny: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "again", TINY, seed=0)
    write_synthetic(tmp_path / "other", TINY, seed=1)
    tensors, again, other = (tensors_of(p) for p in (tiny, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(again[name], t) for name, t in tensors.items())
    assert not any(torch.equal(other[name], t) for name, t in tensors.items())


def test_tensors_and_pieces_of_one_tensor_differ(tmp_path: Path) -> None:
    config = TINY | {"num_hidden_layers": 2, "layer_types": TINY["layer_types"][:2]}
    rows = 3 * PIECE_BYTES // 512  # the embedding takes three pieces
    seen = []
    write_synthetic(
        tmp_path, config | {"vocab_size": rows}, seed=0, progress=lambda d, t: seen.append((d, t))
    )
    tensors = tensors_of(tmp_path)
    pieces = tensors["model.embed_tokens.weight"].chunk(3)
    assert not torch.equal(pieces[0], pieces[1])
    assert not torch.equal(pieces[1], pieces[2])
    first, second = (
        tensors[f"model.layers.{i}.mlp.experts.down_proj_blocks"].flatten() for i in (0, 1)
    )
    assert not torch.equal(first, second)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in tensors.values())


def test_values_have_the_distributions_that_peers_were_measured_with(tiny: Path) -> None:
    tensors = tensors_of(tiny)
    layer = "model.layers.1.mlp"
    scales = tensors[f"{layer}.experts.gate_up_proj_scales"]
    assert scales.unique().tolist() == [119, 120, 121]
    assert (scales == 120).float().mean().item() == pytest.approx(1 / 3, abs=0.02)
    blocks = tensors[f"{layer}.experts.gate_up_proj_blocks"]
    assert blocks.unique().numel() == 256
    assert blocks.float().mean().item() == pytest.approx(127.5, abs=1)
    router = tensors[f"{layer}.router.weight"].float()
    assert router.std().item() == pytest.approx(0.05, rel=0.05)
    head = tensors["lm_head.weight"].float()
    assert head.std().item() == pytest.approx(256**-0.5, rel=0.01)
    assert head.mean().abs().item() < 1e-3
    assert tensors["model.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.03)


def test_logits_are_finite_and_routing_spreads(tiny: Path) -> None:
    model = load_model(tiny)
    ids = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:256]
    logits = logits_of(model, ids.tolist())
    assert logits.isfinite().all()
    assert logits.argmax(-1).unique().numel() > 200
    moe = model.weights.layers[0].moe
    x = model.weights.embedding[ids]
    chosen, _ = route(x, moe.router, moe.router_bias, TINY["num_experts_per_tok"])
    counts = chosen.flatten().bincount(minlength=8)
    assert counts.min() > 256 * 4 / 8 / 4


def test_every_tensor_is_in_the_index(tiny: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tiny)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_text_of_any_words_gives_the_words_again(tokenizer: Tokenizer) -> None:
    ids = list(range(3000)) * 2
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.decode([5, 17]) == " t5 t17"


@pytest.mark.parametrize(
    "text",
    ["", " ", "Hello", "  two  spaces\n\ttab ", "wörld 漢字 🙂", " t5 t3001 t99999999", "t5"],
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    assert special_ids(201088)["<|return|>"] == 200002
    assert special_ids(201088)["<|call|>"] == 200012
    assert tokenizer.special_ids == special_ids(TINY["vocab_size"])
    assert tokenizer.encode("<|start|>user") == [
        tokenizer.special_ids["<|start|>"],
        *tokenizer.encode("user"),
    ]


def test_every_id_stands_for_one_text() -> None:
    ids = sorted(vocabulary(201088).values())
    assert ids == list(range(201088))


def test_an_existing_checkpoint_is_not_overwritten(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        write_synthetic(tiny, TINY, seed=0)


def test_too_little_room_is_told_before_writing(tmp_path: Path) -> None:
    layers = 10_000
    kinds = SIZES["120b"]["layer_types"][:2] * (layers // 2)
    huge = SIZES["120b"] | {"num_hidden_layers": layers, "layer_types": kinds}
    with pytest.raises(ConfigError, match=r"GB of room; this needs 1\d{4}\.\d"):
        write_synthetic(tmp_path / "huge", huge, seed=0)
    assert list((tmp_path / "huge").iterdir()) == []


def test_a_vocabulary_too_small_for_the_special_tokens() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 1000"):
        special_ids(1000)
