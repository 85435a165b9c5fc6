from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.bench.commands import app

ENGINE = ["--device", "cpu", "--kv-cache-memory", "20000000", "--max-model-len", "128"]


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "tiny"
    run("synth", "--size", "tiny", "--seed", "3", str(path))
    return path


def test_synth_then_latency(tiny: Path, tmp_path: Path) -> None:
    csv = tmp_path / "latency.csv"
    sizes = ["--batch", "1,2", "--prompt", "8", "--output", "3"]
    assert "8 tokens in, 3 out" in run("latency", str(tiny), *sizes, "--csv", str(csv), *ENGINE)
    assert len(csv.read_text().splitlines()) == 3


def test_synth_adapter(tiny: Path, tmp_path: Path) -> None:
    run("synth-adapter", "--rank", "3", str(tiny), str(tmp_path / "adapter"))
    assert '"r": 3' in (tmp_path / "adapter/adapter_config.json").read_text()


def test_startup_takes_the_servers_flags_after_two_dashes() -> None:
    assert "after --" in run("startup", "--help")
