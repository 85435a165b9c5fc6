"""headrace bench sweep on the bundled model, from the server's start to its stop."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.bench import sweep as module
from headrace.bench.commands import app
from headrace.bench.memory import descendants
from headrace.bench.report import SweepRow
from headrace.bench.results import write_csv
from headrace.bench.server_process import is_healthy, largest_rank, lora_flags, running_server
from headrace.bench.sweep import Sweep, parse_users
from headrace.config import ConfigError
from headrace.files import BUNDLED_MODEL

ADAPTERS = BUNDLED_MODEL.parent / "adapters"


def test_a_sweep_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_PROMPTS", 2)
    flags = ["--users", "1,2", "--input-len", "12", "--output-len", "3"]
    flags += ["--prompts-per-user", "1", "--out", str(tmp_path)]
    flags += ["--serve-args", "--device cpu --kv-cache-memory 16000000"]
    loads = [(2, 12, 3, 0), (8, 12, 3, 0)]  # measured before: the first again, the other stays
    write_csv(tmp_path / "serve.csv", [SweepRow(*load, 0.0, 0.0, 0.0, 0.0) for load in loads])
    result = CliRunner().invoke(app, ["sweep", str(BUNDLED_MODEL), *flags])
    assert result.exit_code == 0, result.output
    with (tmp_path / "serve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "users", "input_len", "output_len", "adapters",
        "output_tok_s", "mean_ttft_ms", "median_ttft_ms", "mean_tpot_ms",
    ]  # fmt: skip
    assert [(r["users"], r["input_len"], r["output_len"], r["adapters"]) for r in rows] == [
        ("8", "12", "3", "0"),
        ("1", "12", "3", "0"),
        ("2", "12", "3", "0"),
    ]
    for row in rows[1:]:
        # a user's 3 tokens take the first one's time and twice the others'
        seconds = (float(row["mean_ttft_ms"]) + 2 * float(row["mean_tpot_ms"])) / 1000
        assert 0 < float(row["output_tok_s"]) <= 1.05 * int(row["users"]) * 3 / seconds
    assert (tmp_path / "serve.html").read_text().count("<svg") == 3
    assert "1 users, 12 in / 3 out, 0 adapters" in result.output


def test_a_server_that_does_not_start_shows_its_log() -> None:
    with (
        pytest.raises(ConfigError, match=r"did not start:\n.*max_num_seqs|max-num-seqs"),
        running_server(BUNDLED_MODEL, ["--max-num-seqs", "0"], start_timeout=240),
    ):
        pytest.fail("it runs")


def test_a_server_that_dies_shows_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    with running_server(BUNDLED_MODEL, ["--device", "cpu"], start_timeout=240) as url:
        for pid in descendants(os.getpid()):
            if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
        while is_healthy(url):
            time.sleep(0.1)
    told = capsys.readouterr().err
    assert "not healthy any more" in told
    assert f"Serving tiny on {url}" in told


def test_adapters_become_the_servers_flags() -> None:
    modules = tuple(f"{name}={ADAPTERS / name}" for name in ("reverse", "subtract"))
    assert largest_rank(modules) == 8
    assert lora_flags(modules) == [
        "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8",
        f"--lora-modules=reverse={ADAPTERS / 'reverse'}",
        f"--lora-modules=subtract={ADAPTERS / 'subtract'}",
    ]  # fmt: skip
    assert lora_flags(()) == []


@pytest.mark.parametrize(
    ("users", "modules"), [("1,x", ()), ("0", ()), ("", ()), ("1", ("a",)), ("1", ("a=/none",))]
)
def test_wrong_flags_are_refused(users: str, modules: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--users|--lora-modules|adapter_config.json"):
        Sweep(BUNDLED_MODEL, parse_users(users), 8, 8, 1, modules, "", 1)
