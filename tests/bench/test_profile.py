from __future__ import annotations

import csv
from pathlib import Path

import pytest

from headrace.bench import floors
from headrace.bench.floors import GPUS, step_work
from headrace.bench.profile import NUM_STEPS, decoding, gpu_rows, run_profile
from headrace.bench.synth import SIZES, write_synthetic
from headrace.bench.timeline import Span, one_step
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.files import BUNDLED_MODEL
from headrace.models.config import parse_config

CONFIG = EngineConfig(
    model=BUNDLED_MODEL, device="cpu", max_model_len=128, kv_cache_memory=20_000_000
)


def test_operators_of_a_decode_step_and_a_prefill_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_profile(CONFIG, [1, 3], prompt=20, csv=tmp_path / "profile.csv")
    assert "cpu: one token for each of 3 requests, after 20" in capsys.readouterr().out
    with (tmp_path / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = [("prefill", "1"), ("decode", "1"), ("decode", "3")]
    assert list(dict.fromkeys((row["phase"], row["batch"]) for row in rows)) == sizes
    for size in sizes:
        mine = [row for row in rows if (row["phase"], row["batch"]) == size]
        matmuls = [row for row in mine if row["kernel"] in ("aten::mm", "aten::addmm")]
        assert sum(float(row["count"]) for row in matmuls) >= 6 * 2 + 1  # 6 layers, the LM head
        assert mine[-1]["kernel"] == "all operators"
        whole = pytest.approx(float(mine[-1]["us"]), rel=1e-4)  # 5 digits in the file
        assert sum(float(row["us"]) for row in mine[:-1]) == whole


def test_all_requests_decode_while_they_are_profiled() -> None:
    engine = Engine(CONFIG)
    with decoding(engine, 3, 20):
        before = engine.stats().num_steps
        for _ in range(NUM_STEPS):
            assert len([o for o in engine.step() if o.token_ids]) == 3
        stats = engine.stats()
        assert stats.num_steps == before + NUM_STEPS
        assert set(stats.iteration_tokens) == {3}
    assert not engine.has_work()
    engine.check()


def test_rows_of_a_gpu_step_by_hand() -> None:
    config = parse_config(SIZES["20b"])
    work = step_work(config, floors.Step(1, 1, 512))
    spans, at = [Span("embed_kernel", 0.0, 2.0)], 3.0
    names = ["linear_kernel", "attention_kernel", "linear_kernel", "router_kernel"]
    for name in [*names, "grouped_matmul_kernel", "grouped_matmul_kernel"] * 24 + ["linear_kernel"]:
        spans.append(Span(name, at, at + 10.0))
        at += 10.0
    steps = [one_step(spans, until=at + 5.0), one_step(spans, until=at + 7.0)]
    rows = {
        row.kernel: row
        for row in gpu_rows("decode", floors.Step(1, 1, 512), steps, config, GPUS[0])
    }
    qkv = rows["linear_kernel qkv"]
    assert (qkv.count, qkv.us) == (24, 240)
    assert qkv.mbytes == pytest.approx(24 * 5120 * 2880 * 2 / 1e6)
    assert qkv.floor_us == pytest.approx(24 * 5120 * 2880 * 2 / 3.0e12 * 1e6)
    assert qkv.floor_share == pytest.approx(qkv.floor_us / 240)
    assert rows["linear_kernel lm_head"].count == 1
    assert rows["grouped_matmul_kernel down"].gflops == pytest.approx(work["down"].flops / 1e9)
    assert rows["embed_kernel"].floor_us is None
    assert rows["nothing, within a step"].us == 1
    assert rows["nothing, between steps"].us == 6
    whole = rows["the whole step"]
    assert whole.us == at + 6
    assert whole.floor_us == pytest.approx(1e6 * floors.total(work).floor_s(GPUS[0]))
    parts = [row for name, row in rows.items() if name != "the whole step"]
    assert sum(row.us for row in parts) == pytest.approx(whole.us)
    assert sum(row.share for row in parts) == pytest.approx(1)


def test_an_unknown_gpu_has_no_floor() -> None:
    config = parse_config(SIZES["20b"])
    step = one_step([Span("router_kernel", 0, 1)] * 24)
    (row, *_) = gpu_rows("decode", floors.Step(1, 1, 512), [step], config, None)
    assert row.kernel == "router_kernel router"
    assert row.mbytes == pytest.approx(24 * 32 * 2880 * 2 / 1e6)
    assert (row.floor_us, row.floor_share) == (None, None)


@pytest.mark.parametrize(("batch", "prompt", "message"), [(0, 5, "at least 1"), (1, 120, "fit")])
def test_sizes_that_do_not_fit(batch: int, prompt: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_profile(CONFIG, [batch], prompt, None)


@pytest.mark.gpu
def test_kernels_of_a_decode_step_and_a_prefill_on_the_gpu(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "tiny", SIZES["tiny"], seed=0)
    config = EngineConfig(model=tmp_path / "tiny", device="cuda", kv_cache_memory=100_000_000)
    run_profile(config, [1, 3], prompt=100, csv=tmp_path / "profile.csv")
    with (tmp_path / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    for size in (("prefill", "1"), ("decode", "1"), ("decode", "3")):
        mine = [row for row in rows if (row["phase"], row["batch"]) == size]
        us = {row["kernel"]: float(row["us"]) for row in mine}
        whole = us.pop("the whole step")
        assert sum(us.values()) == pytest.approx(whole, rel=1e-4)  # rounded to 5 digits
        for op in ("qkv", "attention", "output", "gate_up", "down", "lm_head"):
            assert any(kernel.endswith(f" {op}") and t > 0 for kernel, t in us.items()), (op, us)
        assert us["nothing, within a step"] >= 0
