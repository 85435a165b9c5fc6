"""What the reader takes, and what it refuses by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.config import ConfigError
from headrace.lora.adapter import AdapterNotFoundError
from headrace.lora.factors import Factors
from headrace.models import Model, load_model
from tests.checkpoints import random_checkpoint
from tests.lora.adapted import read
from tests.lora.random_adapters import PREFIX, random_adapter, write_adapter

LAYER = f"{PREFIX}model.layers.0."
EXPERTS = f"{LAYER}mlp.experts"
Q_A = f"{LAYER}self_attn.q_proj.lora_A.weight"
Q_B = f"{LAYER}self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    return random_checkpoint(path, seed=2, num_hidden_layers=1, num_local_experts=3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_model(checkpoint)


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    return random_adapter(tmp_path / "adapter", checkpoint, 0)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> None:
    """Change an adapter's tensors and fields in place."""
    tensors = tensors_of(path)
    change(tensors)
    fields = json.loads((path / "adapter_config.json").read_text()) | config
    write_adapter(path, tensors, **fields)


def delta(factors: Factors) -> Tensor:  # [num_experts, in, out]
    return torch.einsum("eri,ero->eio", factors.a.double(), factors.b.double()) * factors.scale


def by_expert(tensors: dict[str, Tensor], names: dict[str, str], rank: int) -> dict[str, Tensor]:
    """The same adapter with a pair of tensors for each projection of each expert."""
    found = {n: t for n, t in tensors.items() if ".mlp.experts" not in n}
    gate_up_a = tensors[f"{EXPERTS}.base_layer.lora_A.weight"].unflatten(0, (-1, rank))
    gate_up_b = tensors[f"{EXPERTS}.base_layer.lora_B.weight"].unflatten(1, (rank, -1))
    down_a = tensors[f"{EXPERTS}.lora_A.weight"].unflatten(0, (-1, rank))
    down_b = tensors[f"{EXPERTS}.lora_B.weight"].unflatten(1, (rank, -1))
    for e in range(len(gate_up_a)):
        pairs = {
            "gate": (gate_up_a[e], gate_up_b[::2, :, e]),
            "up": (gate_up_a[e], gate_up_b[1::2, :, e]),
            "down": (down_a[e], down_b[:, :, e]),
        }
        for part, (a, b) in pairs.items():
            found[f"{EXPERTS}.{e}.{names[part]}.lora_A.weight"] = a
            found[f"{EXPERTS}.{e}.{names[part]}.lora_B.weight"] = b
    return found


@pytest.mark.parametrize(
    "names",
    [
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        {"gate": "w1", "up": "w3", "down": "w2"},
    ],
    ids=["proj", "w123"],
)
def test_a_pair_for_each_expert_means_the_same(
    model: Model, adapter: Path, tmp_path: Path, names: dict[str, str]
) -> None:
    expected = read(model, adapter).factors
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", *names.values()]
    split = by_expert(tensors_of(adapter), names, rank=4)
    path = write_adapter(tmp_path / "split", split, target_modules=targets, target_parameters=None)
    got = read(model, path)
    assert got.warnings == ()
    assert got.factors.keys() == expected.keys()
    for key, factors in got.factors.items():
        assert torch.allclose(delta(factors), delta(expected[key]), atol=1e-6), key
    assert got.factors["model.layers.0.mlp.experts.gate_up_proj"].rank == 8  # gate's and up's
    with pytest.raises(ConfigError, match="gate and up together have rank 8, above --max-lora-r"):
        read(model, path, max_rank=7)


def test_unsloths_names(model: Model, checkpoint: Path, tmp_path: Path) -> None:
    """A linear layer for each expert in lists, gate and up in one, and one in the router."""
    plain = random_adapter(tmp_path / "plain", checkpoint, 1, everything=True)
    tensors = {n: t for n, t in tensors_of(plain).items() if ".mlp." in n}
    path = write_adapter(tmp_path / "plain", tensors, target_modules=[])
    expected = read(model, path).factors
    renamed = {}
    for name, tensor in tensors.items():
        if "router" in name:
            renamed[name.replace("router", "router.linear")] = tensor
            continue
        kind = "gate_up_projs" if "base_layer" in name else "down_projs"
        for e in range(3):
            piece = tensor[4 * e : 4 * e + 4] if "lora_A" in name else tensor[:, e::3]
            renamed[f"{EXPERTS}.{kind}.{e}.lora_{name[-8]}.weight"] = piece
    names = [f"{kind}.{e}" for kind in ("gate_up_projs", "down_projs") for e in range(3)]
    path = write_adapter(
        tmp_path / "unsloth",
        renamed,
        target_modules=[*names, "router.linear"],
        target_parameters=None,
    )
    got = read(model, path)
    assert got.warnings == ()
    assert got.factors.keys() == expected.keys()
    for key, factors in got.factors.items():
        assert torch.equal(factors.a, expected[key].a), key
        assert torch.equal(factors.b, expected[key].b), key


def test_some_experts_and_some_projections(model: Model, adapter: Path, tmp_path: Path) -> None:
    """Expert 1 has only up at rank 2 with another alpha, expert 2 only gate: the rest is zero."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    split = by_expert(tensors_of(adapter), names, rank=4)
    up, gate = f"{EXPERTS}.1.up_proj.lora_", f"{EXPERTS}.2.gate_proj.lora_"
    kept = {
        f"{up}A.weight": split[f"{up}A.weight"][:2],
        f"{up}B.weight": split[f"{up}B.weight"][:, :2],
        f"{gate}A.weight": split[f"{gate}A.weight"],
        f"{gate}B.weight": split[f"{gate}B.weight"],
    }
    path = write_adapter(
        tmp_path / "some",
        kept,
        target_modules=["up_proj", "gate_proj"],
        target_parameters=[],
        rank_pattern={"experts.1.up_proj": 2},
        alpha_pattern={"up_proj": 5},
        use_rslora=True,
    )
    factors = read(model, path).factors
    got = delta(factors.pop("model.layers.0.mlp.experts.gate_up_proj"))
    assert not factors
    expected = torch.zeros_like(got)
    pair = {n[-8]: t.double() for n, t in kept.items() if n.startswith(up)}
    expected[1, :, 1::2] = (pair["B"] @ pair["A"]).T * 5 / 2**0.5
    pair = {n[-8]: t.double() for n, t in kept.items() if n.startswith(gate)}
    expected[2, :, ::2] = (pair["B"] @ pair["A"]).T * 8 / 4**0.5
    assert torch.allclose(got, expected, atol=1e-6)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("alpha", [8, 3])
def test_experts_of_several_dtypes(model: Model, adapter: Path, alpha: float) -> None:
    """No value is rounded to the dtype of another tensor, nor the product of B and a ratio."""
    half, short, full = torch.float16, torch.bfloat16, torch.float32
    tensors: dict[str, Tensor] = {}
    for e, (a_dtype, b_dtype) in enumerate(((half, short), (short, short), (full, full))):
        tensors[f"{EXPERTS}.{e}.w2.lora_A.weight"] = torch.rand(4, 64).to(a_dtype)
        tensors[f"{EXPERTS}.{e}.w2.lora_B.weight"] = (1e6 * torch.rand(64, 4)).to(b_dtype)
    patterns = {"experts.1.w2": alpha}
    rewrite(adapter, lambda t: (t.clear(), t.update(tensors)), alpha_pattern=patterns)
    got = delta(read(model, adapter).factors["model.layers.0.mlp.experts.down_proj"])
    for e, scale in enumerate((2, alpha / 4, 2)):
        b, a = (tensors[f"{EXPERTS}.{e}.w2.lora_{side}.weight"].double() for side in "BA")
        assert torch.allclose(got[e], (b @ a).T * scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(model: Model, adapter: Path, dtype: torch.dtype) -> None:
    exact = {key: delta(f) for key, f in read(model, adapter).factors.items()}
    rewrite(adapter, lambda t: t.update({n: x.to(dtype) for n, x in t.items()}))
    for key, factors in read(model, adapter).factors.items():
        assert factors.a.dtype == dtype
        assert torch.allclose(delta(factors), exact[key], atol=2e-2), key


def test_names_without_pefts_prefix(model: Model, adapter: Path) -> None:
    expected = read(model, adapter).factors
    tensors = {n.removeprefix(PREFIX): t for n, t in tensors_of(adapter).items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    got = read(model, adapter).factors
    assert all(torch.equal(got[key].b, expected[key].b) for key in expected)


def test_its_tensors_outlive_the_file(model: Model, adapter: Path) -> None:
    factors = read(model, adapter).owned().factors["model.layers.0.self_attn.q_proj"]
    before = factors.a.clone()
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(factors.a, before)


def test_warnings(model: Model, adapter: Path) -> None:
    rewrite(adapter, lambda t: (t.pop(Q_A), t.pop(Q_B)))
    assert read(model, adapter).warnings == (
        "targeted by adapter_config.json but not in the file: model.layers.0.self_attn.q_proj",
    )
    rewrite(adapter, lambda t: None, target_modules="All-Linear", exclude_modules=["q_proj"])
    assert read(model, adapter).warnings == ()
    experts = {n: t for n, t in tensors_of(adapter).items() if ".mlp.experts." in n}
    names = ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rewrite(
        adapter,
        lambda t: [t.pop(n) for n in experts],
        target_modules=names,
        target_parameters=[],
        exclude_modules=[],
    )
    assert read(model, adapter).warnings == ()  # the experts' down_proj is no module
    rewrite(adapter, lambda t: t.update(experts), target_parameters=["experts.down_proj"])
    assert read(model, adapter).warnings == (
        "applied though adapter_config.json does not target them: "
        "model.layers.0.mlp.experts.gate_up_proj",
    )
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    rewrite(adapter, lambda t: None, target_parameters=both)
    zeros = {n: t * 0 for n, t in tensors_of(adapter).items() if "lora_B" in n}
    rewrite(adapter, lambda t: t.update(zeros), target_modules=["v_proj"], exclude_modules=None)
    assert read(model, adapter).warnings == (
        "every delta is zero: the adapter changes nothing",
        "applied though adapter_config.json does not target them: "
        "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.o_proj",
    )


FIELDS: dict[str, dict[str, Any]] = {
    "DoRA is not supported": {"use_dora": True},
    "bias is 'all': biases are not supported": {"bias": "all"},
    "modules_to_save is ['lm_head']": {"modules_to_save": ["lm_head"]},
    "lora_bias is True: biases are not supported": {"lora_bias": True},
    "peft_type is 'LOHA'": {"peft_type": "LOHA"},
    "r is 0": {"r": 0},
    "lora_alpha is 'x'": {"lora_alpha": "x"},
    "rank_pattern is {'q_proj': 0}": {"rank_pattern": {"q_proj": 0}},
    "alpha_pattern is {'(': 3}": {"alpha_pattern": {"(": 3}},
    "target_modules is '('": {"target_modules": "("},
    "init_lora_weights is 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights is 'lora-ga', which may change the base": {"init_lora_weights": "lora-ga"},
    "use_rslora is 'false'; it must be true or false": {"use_rslora": "false"},
    "layers_to_transform is '1'; it must be a whole": {"layers_to_transform": "1"},
    "lora_alpha is 1e+39; it must be a number that float32 holds": {"lora_alpha": 1e39},
    "lora_alpha is 1000": {"lora_alpha": 10**400},
    "its rank is 4, but adapter_config.json says 1000": {"rank_pattern": {"q_proj": 10**400}},
    "rank_pattern is {'(?i)q_proj': 4}": {"rank_pattern": {"(?i)q_proj": 4}},
    "alpha_pattern is {'a{99999999999}'": {"alpha_pattern": {"a{99999999999}": 4}},
    "target_modules is '((((": {"target_modules": "(" * 6000 + ")" * 6000},
    "'((.|..)+)+(?<=x)' takes longer than 1.0 s to match model.layers.0.": {
        "target_modules": "((.|..)+)+(?<=x)"
    },
    r"'\ud800' is True: this field is not known here": {"\ud800": True},
    "use_frobnication is True: this field is not known here": {"use_frobnication": True},
    "activated LoRA is not supported": {"alora_invocation_tokens": [1]},
}


@pytest.mark.parametrize("reason", FIELDS)
def test_fields_that_are_refused(model: Model, adapter: Path, reason: str) -> None:
    rewrite(adapter, lambda t: None, **FIELDS[reason])
    with pytest.raises(ConfigError) as caught:
        read(model, adapter)
    assert reason in str(caught.value)


TENSORS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    f"tensor {Q_A}: its partner lora_B is missing": lambda t: t.pop(Q_B),
    f"tensor {Q_A}: it holds NaN or infinity": lambda t: t[Q_A][1, 2].fill_(torch.nan),
    f"tensor {Q_B}: it holds NaN or infinity": lambda t: t[Q_B][1, 2].fill_(-torch.inf),
    f"tensor {Q_A}: its shape is [4, 63]; it must be [4, 64]": lambda t: t.update(
        {Q_A: t[Q_A][:, :63]}
    ),
    f"tensor {Q_A}: its rank is 3, but adapter_config.json says 4": lambda t: t.update(
        {Q_A: t[Q_A][:3], Q_B: t[Q_B][:, :3]}
    ),
    f"tensor {Q_A}: its dtype is F64": lambda t: t.update({Q_A: t[Q_A].double()}),
    "lora_magnitude_vector: only lora_A and lora_B tensors can be applied": lambda t: t.update(
        {f"{LAYER}self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}
    ),
    "layers.7.self_attn.q_proj.lora_A.weight: this model has no such module": lambda t: t.update(
        {n.replace("layers.0", "layers.7"): t[n] for n in (Q_A, Q_B)}
    ),
    "layers.7.mlp.experts.lora_A.weight: this model has no such module": lambda t: t.update(
        {n.replace("layers.0", "layers.7"): x for n, x in t.items() if "experts.lora" in n}
    ),
    "experts.lora_A.weight: [12, 64] and [63, 12] fit neither gate_up_proj nor": lambda t: t.update(
        {f"{EXPERTS}.lora_B.weight": t[f"{EXPERTS}.lora_B.weight"][:63]}
    ),
    f"tensor {Q_A.removeprefix(PREFIX)}: {Q_A} means the same": lambda t: t.update(
        {Q_A.removeprefix(PREFIX): t[Q_A]}
    ),
    "must be rank * 3": lambda t: t.update(
        {
            f"{EXPERTS}.lora_A.weight": t[f"{EXPERTS}.lora_A.weight"][:11],
            f"{EXPERTS}.lora_B.weight": t[f"{EXPERTS}.lora_B.weight"][:, :11],
        }
    ),
    "another tensor of the file adapts model.layers.0.mlp.experts.down_proj": lambda t: t.update(
        {n.replace("experts.", "experts.base_layer."): x for n, x in t.items() if "experts.l" in n}
    ),
    "is also adapted by one tensor for all experts": lambda t: t.update(
        {
            f"{EXPERTS}.0.w2.lora_A.weight": torch.ones(4, 64),
            f"{EXPERTS}.0.w2.lora_B.weight": torch.ones(64, 4),
        }
    ),
    "this model has 3 experts in a layer": lambda t: t.update(
        {
            f"{EXPERTS}.3.w2.lora_A.weight": torch.ones(4, 64),
            f"{EXPERTS}.3.w2.lora_B.weight": torch.ones(64, 4),
        }
    ),
    "99.w2.lora_A.weight: this model has no such module": lambda t: t.update(
        {
            f"{EXPERTS}.{'9' * 5000}.w2.lora_A.weight": torch.ones(4, 64),
            f"{EXPERTS}.{'9' * 5000}.w2.lora_B.weight": torch.ones(64, 4),
        }
    ),
    "it differs from the base model's lm_head.weight": lambda t: t.update(
        {f"{PREFIX}lm_head.base_layer.weight": torch.ones(256, 64)}
    ),
    "the tensor must be named lora_embedding_A": lambda t: t.update(
        {
            f"{PREFIX}model.embed_tokens.lora_A.weight": torch.ones(4, 256),
            f"{PREFIX}model.embed_tokens.lora_B.weight": torch.ones(64, 4),
        }
    ),
    "embed_tokens.lora_A.weight: for this module the tensor must be named": lambda t: t.update(
        {
            f"{PREFIX}model.embed_tokens.lora_A.weight": torch.ones(4, 256),
            f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(64, 4),
        }
    ),
    "experts.lora_embedding_B: for this module the tensor must be named lora_B": lambda t: t.update(
        {f"{EXPERTS}.lora_embedding_B": t.pop(f"{EXPERTS}.lora_B.weight")}
    ),
    "holds no LoRA tensors": lambda t: t.clear(),
}


@pytest.mark.parametrize("reason", TENSORS)
def test_tensors_that_are_refused(model: Model, adapter: Path, reason: str) -> None:
    rewrite(adapter, TENSORS[reason])
    with pytest.raises(ConfigError) as caught:
        read(model, adapter)
    assert reason in str(caught.value)


@pytest.mark.parametrize("shape", [(), (4,), (0, 64), (4, 0), (1, 4, 64)])
@pytest.mark.parametrize("name", [Q_A, Q_B, f"{EXPERTS}.lora_A.weight", f"{EXPERTS}.lora_B.weight"])
def test_what_is_no_matrix(model: Model, adapter: Path, name: str, shape: tuple[int, ...]) -> None:
    rewrite(adapter, lambda t: t.update({name: torch.ones(shape)}))
    with pytest.raises(ConfigError) as caught:
        read(model, adapter)
    assert f"tensor {name}: its shape is {list(shape)}; it must be a matrix" in str(caught.value)


def test_ranks_above_the_servers_limit(model: Model, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="its rank is 4, above --max-lora-rank 3"):
        read(model, adapter, max_rank=3)


def test_missing_files(model: Model, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="it is not a directory"):
        read(model, tmp_path / "nowhere")
    with pytest.raises(AdapterNotFoundError, match="it is not a directory"):
        read(model, Path("a" * 5000))
    file = adapter / "adapter_model.safetensors"
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterNotFoundError, match=r"convert adapter_model\.bin to safetensors"):
        read(model, adapter)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="cannot read"):
        read(model, adapter)
    (adapter / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"cannot read .*adapter_config\.json"):
        read(model, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*adapter_config\.json"):
        read(model, adapter)
    os.mkfifo(adapter / "adapter_config.json")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: it is not a file"):
        read(model, adapter)
