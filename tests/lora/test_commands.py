"""`headrace lora check`, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli import BUNDLED_MODEL, app
from headrace.config import ConfigError
from tests.checkpoints import random_checkpoint
from tests.lora.random_adapters import random_adapter

ADAPTER = BUNDLED_MODEL.parent / "adapters" / "reverse"


def check(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["lora", "check", *arguments])
    if result.exception:
        raise result.exception
    return result.stdout


def test_it_says_what_an_adapter_holds() -> None:
    text = check(str(ADAPTER))
    assert "mlp.experts.gate_up_proj" in text
    assert "8 x 256 -> 512" in text
    assert "largest rank 8, 1.1 MB on the device in bfloat16" in text
    assert "self-check of 36 targets: largest error" in text
    assert text.rstrip().endswith(f"loads beside {BUNDLED_MODEL}")


def test_it_says_why_one_would_not_load(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", seed=0)
    with pytest.raises(ConfigError, match=r"q_proj\.lora_A\.weight: its shape is \[8, 256\]"):
        check(str(ADAPTER), "--model", str(model))
    with pytest.raises(ConfigError, match="its rank is 8, above --max-lora-rank 4"):
        check(str(ADAPTER), "--max-lora-rank", "4")
    wide = random_adapter(tmp_path / "wide", model, 0, rank=65)
    with pytest.raises(ConfigError, match="its rank is 65, above --max-lora-rank 64"):
        check(str(wide), "--model", str(model))  # as a server without flags would
    assert "rank 65," in check(str(wide), "--model", str(model), "--max-lora-rank", "65")
    unnamed = random_adapter(tmp_path / "unnamed", model, 0)
    with pytest.raises(ConfigError, match="an unnamed model: give --model DIR"):
        check(str(unnamed))
    assert "loads beside" in check(str(unnamed), "--model", str(model))
    far = random_adapter(tmp_path / "far", model, 0, base_model_name_or_path="a" * 5000)
    with pytest.raises(ConfigError, match="aaa: give --model DIR"):
        check(str(far))
