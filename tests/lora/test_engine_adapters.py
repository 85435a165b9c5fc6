"""Adapters through the engine: many over few slots, and what becomes of names."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.lora_rows import slot_of
from headrace.engine.messages import (
    AdapterReply,
    AddRequest,
    LoadAdapter,
    RequestOutput,
    SamplingParams,
    UnloadAdapter,
)
from headrace.engine.request import Request
from headrace.engine.scheduler import Plan
from headrace.lora import loader
from headrace.lora.adapter import CONFIG_NAME, TENSORS_NAME, Adapter, read_adapter
from headrace.lora.pool import LoraPool
from headrace.models import Model, load_model
from tests.checkpoints import random_checkpoint
from tests.engine.toy_model import run, tokens_of
from tests.lora.random_adapters import random_adapter

PROMPTS = ([5, 9, 200, 31, 7], [77, 3, 3, 120, 64, 18, 2])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    return random_checkpoint(path, seed=5, num_hidden_layers=1, num_local_experts=3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_model(checkpoint)


def adapter_paths(checkpoint: Path, directory: Path, count: int) -> dict[str, Path]:
    """Adapters of ranks 1 to 6."""
    return {
        f"a{i}": random_adapter(directory / f"a{i}", checkpoint, i, rank=1 + i % 6)
        for i in range(count)
    }


def make_engine(model: Model, modules: dict[str, Path], **config: Any) -> Engine:
    named = tuple(f"{name}={path}" for name, path in modules.items())
    fields: dict[str, Any] = {
        **{"enable_lora": True, "lora_modules": named, "max_lora_rank": 8},
        **{"kv_cache_memory": 8 << 20, "block_size": 4},
    }
    return Engine(EngineConfig(**fields | config), model=model)


def ask(request_id: str, prompt: list[int], adapter: str | None, **params: Any) -> AddRequest:
    params = {"max_tokens": 4, "temperature": 0.0} | params
    return AddRequest(request_id, prompt, SamplingParams(**params), 0.0, adapter)


def news(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    """What doesn't depend on the clock or the cache."""
    return [(o.token_ids, o.logprobs, o.finish_reason) for o in outputs]


def change(engine: Engine, message: LoadAdapter | UnloadAdapter) -> AdapterReply:
    """Send a message and step until it is answered."""
    engine.adapters.handle(message)
    while not (replies := engine.adapters.take_replies()):
        engine.step()
    [reply] = replies
    return reply


def pool_of(engine: Engine) -> LoraPool[Request]:
    assert engine.adapters.pool is not None
    return engine.adapters.pool


def refuse(*_: object) -> str:
    """In place of the self-check."""
    raise ConfigError("the self-check says no")


def check_idle(engine: Engine) -> None:
    """No adapter is held, and books of slots and memory add up."""
    pool = pool_of(engine)
    assert all(not lora.holders and not lora.parked for lora in pool.names.values())
    pool.check()


def test_64_adapters_over_8_slots_for_1000_requests(
    checkpoint: Path, model: Model, tmp_path: Path
) -> None:
    paths = adapter_paths(checkpoint, tmp_path, 64)
    large = make_engine(model, paths, max_loras=64)
    expected = {
        (name, i): tokens_of(run(large, ask("x", prompt, name))["x"])
        for name in [*paths, None]
        for i, prompt in enumerate(PROMPTS)
    }
    assert len({tuple(t) for t in expected.values()}) > 100  # the adapters matter
    engine = make_engine(model, paths, max_loras=8, max_cpu_loras=32, max_num_seqs=48)
    names = [*paths, None]
    wanted = [(names[i % len(names)], i % 2) for i in range(1000)]
    requests = [ask(f"r{i}", PROMPTS[p], name) for i, (name, p) in enumerate(wanted)]
    outputs = run(engine, *requests)
    for i, key in enumerate(wanted):
        assert tokens_of(outputs[f"r{i}"]) == expected[key], (i, key)
    assert engine.stats().num_adapter_copies == 64  # one turn each: eight of them at the start
    check_idle(engine)


def test_base_rows_keep_their_bits(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    """With and without --enable-lora, and beside adapters: logprobs are equal to the last bit."""
    paths = adapter_paths(checkpoint, tmp_path, 3)
    base = ask("base", PROMPTS[0], None, logprobs=3, max_tokens=8)
    plain = Engine(EngineConfig(kv_cache_memory=8 << 20, block_size=4), model=model)
    expected = news(run(plain, base)["base"])
    engine = make_engine(model, paths, enable_prefix_caching=False)
    memory = pool_of(engine).memory.weights.memory
    assert (plain.ready.start.adapter_bytes, engine.ready.start.adapter_bytes) == (0, memory.nbytes)
    assert news(run(engine, base)["base"]) == expected
    others = [ask(f"r{i}", PROMPTS[1], f"a{i}", max_tokens=8) for i in range(3)]
    together = run(engine, others[0], base, *others[1:])["base"]
    assert news(together) == expected


def test_requests_of_one_adapter_stand_together(
    checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of an expert's rows then seldom has rows of two adapters."""
    engine = make_engine(model, adapter_paths(checkpoint, tmp_path, 2))
    steps: list[list[int]] = []
    forward = engine.runner.forward

    def note(plan: Plan, output_rows: list[int]) -> Tensor:
        steps.append([slot_of(request) for request in plan])
        return forward(plan, output_rows)

    monkeypatch.setattr(engine.runner, "forward", note)
    run(engine, *(ask(f"r{i}", PROMPTS[0], ("a0", None, "a1")[i % 3]) for i in range(9)))
    assert all(slots == sorted(slots) for slots in steps)
    assert max(len(slots) for slots in steps) == 9
    assert len(set(steps[-1])) == 3


def test_loads_in_place_forget_the_prefixes(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    engine = make_engine(model, {})
    prompt = list(range(100, 130))
    for i in range(2):
        random_adapter(tmp_path / f"v{i}", checkpoint, i)
    path = shutil.copytree(tmp_path / "v0", tmp_path / "served")
    assert change(engine, LoadAdapter("x", str(path))).error is None
    first = run(engine, ask("1", prompt, "x"))["1"]
    again = run(engine, ask("2", prompt, "x"))["2"]
    assert (first[0].num_cached_tokens, again[0].num_cached_tokens) == (0, 28)
    assert tokens_of(again) == tokens_of(first)
    taken = change(engine, LoadAdapter("x", str(path)))
    assert str(taken.error).startswith("the LoRA adapter 'x' is already loaded; unload it first")
    shutil.copytree(tmp_path / "v1", path, dirs_exist_ok=True)
    assert change(engine, LoadAdapter("x", str(path), in_place=True)).error is None
    second = run(engine, ask("3", prompt, "x"))["3"]
    assert second[0].num_cached_tokens == 0
    assert tokens_of(second) != tokens_of(first)
    fresh = make_engine(model, {"y": tmp_path / "v1"})
    assert tokens_of(second) == tokens_of(run(fresh, ask("1", prompt, "y"))["1"])
    base = run(engine, ask("4", prompt, None))["4"]
    assert base[0].num_cached_tokens == 0
    check_idle(engine)


def test_a_load_in_place_that_fails_keeps_the_old(
    checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, adapter_paths(checkpoint, tmp_path, 1))
    expected = tokens_of(run(engine, ask("1", PROMPTS[0], "a0"))["1"])
    new = random_adapter(tmp_path / "new", checkpoint, 50)
    monkeypatch.setattr(loader, "check_adapter", refuse)
    reply = change(engine, LoadAdapter("a0", str(new), in_place=True))
    assert reply.error == "the self-check says no"
    assert tokens_of(run(engine, ask("2", PROMPTS[0], "a0"))["2"]) == expected
    assert len(pool_of(engine).resident) == 1
    check_idle(engine)


def leased_files() -> list[str]:
    """What this process keeps others from writing."""
    opened = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(fd) for fd in opened if os.path.islink(fd)]
    return [name for name in names if name.endswith(TENSORS_NAME)]


def finish_loading(engine: Engine) -> None:
    """Step while there is work, and wait for the loader's thread."""
    while engine.has_work():
        engine.step()
    pool_of(engine)._loader._loading.submit(lambda: None).result()


def test_refused_loads_let_go_of_their_files(
    checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too large for the device, or refused by the self-check: at the load and at its first use.

    The garbage collector, which an engine at rest never wakes, is not needed.
    """
    small, large = (random_adapter(tmp_path / f"{r}", checkpoint, r, rank=r) for r in (1, 8))
    room = pool_of(make_engine(model, {"x": small})).names["x"].size * model.dtype.itemsize
    engine = make_engine(model, {}, max_loras=1, max_cpu_loras=1, lora_memory=room)
    gc.collect()
    gc.disable()
    try:
        assert "--lora-memory holds" in str(change(engine, LoadAdapter("x", str(large))).error)
        finish_loading(engine)
        assert leased_files() == []
        for name in ("a", "b", "c"):  # on the device, in CPU memory, on disk only
            assert change(engine, LoadAdapter(name, str(small))).error is None
        finish_loading(engine)
        monkeypatch.setattr(loader, "check_adapter", refuse)
        assert run(engine, ask("1", PROMPTS[0], "c"))["1"][-1].finish_reason == "error"
        finish_loading(engine)
        assert leased_files() == []
        assert change(engine, LoadAdapter("x", str(small))).error == "the self-check says no"
        finish_loading(engine)
        assert leased_files() == []
    finally:
        gc.enable()
    check_idle(engine)


def test_unload_waits_for_requests_and_frees_all(
    checkpoint: Path, model: Model, tmp_path: Path
) -> None:
    engine = make_engine(model, adapter_paths(checkpoint, tmp_path, 2), max_loras=2)
    pool = pool_of(engine)
    expected = tokens_of(run(engine, ask("0", PROMPTS[0], "a0"))["0"])
    engine.add_request(ask("1", PROMPTS[0], "a0"))
    got = [t for output in engine.step() for t in output.token_ids]
    reply = change(engine, UnloadAdapter("a0"))
    assert reply == AdapterReply("a0")
    assert engine.stats().running_adapters == ["a0"]  # for those who route
    while engine.has_work():
        got += [t for output in engine.step() for t in output.token_ids]
    assert got[: len(expected)] == expected
    assert list(pool.names) == ["a1"]
    assert [lora.name for lora in pool.resident] == ["a1"]
    [refusal] = run(engine, ask("2", PROMPTS[0], "a0"))["2"]
    assert refusal.error == "the LoRA adapter 'a0' is not loaded"
    assert change(engine, UnloadAdapter("a0")).not_found
    assert change(engine, UnloadAdapter("a1")).error is None
    assert pool.resident == []
    check_idle(engine)


def test_errors_of_loads_name_the_adapter(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    engine = make_engine(model, {})
    lost = change(engine, LoadAdapter("x", str(tmp_path / "nowhere")))
    assert lost.not_found
    assert "nowhere" in str(lost.error)
    high = random_adapter(tmp_path / "high", checkpoint, 0, rank=9)
    reply = change(engine, LoadAdapter("x", str(high)))
    assert not reply.not_found
    assert "its rank is 9, above --max-lora-rank 8" in str(reply.error)
    small = make_engine(model, {}, lora_memory=1 << 14)
    low = random_adapter(tmp_path / "low", checkpoint, 0)
    assert "--lora-memory holds" in str(change(small, LoadAdapter("x", str(low))).error)
    none = make_engine(model, {}, lora_memory=1)
    assert "--lora-memory holds 0" in str(change(none, LoadAdapter("x", str(low))).error)
    twice = EngineConfig(enable_lora=True, lora_modules=(f"a={low}", f"a={high}"))
    with pytest.raises(ConfigError, match="--lora-modules a: two adapters have this name"):
        Engine(twice, model=model)
    with pytest.raises(ConfigError, match="--lora-modules b: No adapter found"):
        make_engine(model, {"b": tmp_path / "nowhere"})
    with pytest.raises(ConfigError, match="--lora-modules needs --enable-lora"):
        Engine(EngineConfig(lora_modules=("a=b",)), model=model)
    with pytest.raises(ConfigError, match="must be NAME=DIRECTORY"):
        Engine(EngineConfig(enable_lora=True, lora_modules=("ab",)), model=model)
    for name in ("a\nb", "\udcff", "n" * 257):  # argv's bytes may be no UTF-8
        with pytest.raises(ConfigError, match="the name must be 1 to 256 characters"):
            Engine(EngineConfig(enable_lora=True, lora_modules=(f"{name}={low}",)), model=model)
    [refusal] = run(engine, ask("1", PROMPTS[0], "x"))["1"]
    assert refusal.finish_reason == "error"
    plain = Engine(EngineConfig(kv_cache_memory=8 << 20), model=model)
    assert "without --enable-lora" in str(change(plain, LoadAdapter("x", str(low))).error)
    assert plain.ready.max_loras == 0


def test_files_that_change_behind_the_cpu_copy_fail_their_requests_only(
    checkpoint: Path, model: Model, tmp_path: Path
) -> None:
    paths = adapter_paths(checkpoint, tmp_path, 3)
    engine = make_engine(model, paths, max_loras=1, max_cpu_loras=1)
    random_adapter(paths["a1"], checkpoint, 99, rank=3)
    outputs = run(engine, *(ask(f"r{i}", PROMPTS[0], f"a{i}") for i in range(3)))
    assert "has changed since it was loaded" in str(outputs["r1"][-1].error)
    assert tokens_of(outputs["r0"])
    assert tokens_of(outputs["r2"])
    again = run(engine, ask("r", PROMPTS[0], "a1"))["r"]  # the engine lives, and tries once more
    assert "has changed since it was loaded" in str(again[-1].error)
    assert change(engine, LoadAdapter("a1", str(paths["a1"]), in_place=True)).error is None
    assert tokens_of(run(engine, ask("r", PROMPTS[0], "a1"))["r"])
    check_idle(engine)


def test_requests_that_wait_while_files_are_replaced_get_the_next_load(
    checkpoint: Path, model: Model, tmp_path: Path
) -> None:
    """Nothing but the disk had what they came for."""
    paths = adapter_paths(checkpoint, tmp_path, 2)
    new = random_adapter(tmp_path / "new", checkpoint, 50)
    alone = make_engine(model, {"a1": new})
    expected = tokens_of(run(alone, ask("x", PROMPTS[0], "a1"))["x"])
    engine = make_engine(model, paths, max_loras=1, max_cpu_loras=1)
    engine.add_request(ask("runs", PROMPTS[1], "a0"))
    engine.add_request(ask("waits", PROMPTS[0], "a1"))
    engine.step()
    for name in (CONFIG_NAME, TENSORS_NAME):
        (new / name).replace(paths["a1"] / name)
    engine.adapters.handle(LoadAdapter("a1", str(paths["a1"]), in_place=True))
    while not (replies := engine.adapters.take_replies()):
        engine.adapters.advance()  # no step: the slot stays taken
    assert replies == [AdapterReply("a1")]
    outputs = [output for _ in iter(engine.has_work, False) for output in engine.step()]
    assert tokens_of([o for o in outputs if o.request_id == "waits"]) == expected
    assert tokens_of(run(engine, ask("later", PROMPTS[0], "a1"))["later"]) == expected
    check_idle(engine)


def replace_file(old: Path, new: Path) -> None:
    """By one of the same size and time of writing."""
    os.utime(new, ns=(0, old.stat().st_mtime_ns))
    assert new.stat().st_size == old.stat().st_size
    new.replace(old)


def change_scale(old: Path) -> None:
    old.write_text(old.read_text().replace('"lora_alpha": 4', '"lora_alpha": 9'))


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_files_that_only_seem_the_same_are_not_read_again(
    checkpoint: Path, model: Model, tmp_path: Path, name: str
) -> None:
    """Another scale, or tensors of the same size that are as old as the first."""
    paths = adapter_paths(checkpoint, tmp_path, 2)
    engine = make_engine(model, paths, max_loras=1, max_cpu_loras=1)
    run(engine, ask("r", PROMPTS[0], "a0"))
    if name == CONFIG_NAME:
        change_scale(paths["a1"] / name)
    else:
        other = random_adapter(tmp_path / "other", checkpoint, 99, rank=2)
        replace_file(paths["a1"] / name, other / name)
    outputs = run(engine, ask("r", PROMPTS[0], "a1"))["r"]
    assert "has changed since it was loaded" in str(outputs[-1].error)
    check_idle(engine)


def test_files_that_change_while_they_are_read_are_refused(
    checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter_paths(checkpoint, tmp_path, 2)["a1"]

    def read_late(path: Path, *args: Any) -> Adapter:
        adapter = read_adapter(path, *args)
        change_scale(path / CONFIG_NAME)
        return adapter

    engine = make_engine(model, {})
    with monkeypatch.context() as late:
        late.setattr(loader, "read_adapter", read_late)
        reply = change(engine, LoadAdapter("x", str(path)))
    assert reply.error == f"{path} changed while it was read; load it again"
    assert change(engine, LoadAdapter("x", str(path))).error is None
    check_idle(engine)


def test_an_adapter_without_a_cpu_copy_is_unloaded_like_others(
    checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unloaded while the copy is made, and there is no memory for that."""
    unloaded = threading.Event()

    def fail(adapter: Adapter) -> Adapter:
        assert unloaded.wait(20)
        raise MemoryError

    monkeypatch.setattr(Adapter, "owned", fail)
    engine = make_engine(model, {})
    [path] = adapter_paths(checkpoint, tmp_path, 1).values()
    assert change(engine, LoadAdapter("x", str(path))).error is None
    assert change(engine, UnloadAdapter("x")).error is None
    unloaded.set()
    while engine.has_work():
        engine.step()
    assert pool_of(engine).resident == []
    check_idle(engine)


def test_errors_that_nobody_foresaw_are_named(
    checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In reading, and in the copy for a request; the engine goes on."""

    def fail(*_: object) -> None:
        raise MemoryError

    paths = adapter_paths(checkpoint, tmp_path, 2)
    engine = make_engine(model, paths, max_loras=1)
    with monkeypatch.context() as broken:
        broken.setattr(loader, "read_adapter", fail)
        assert change(engine, LoadAdapter("x", "nowhere")).error == "MemoryError: "
        broken.setattr(pool_of(engine).memory, "write", fail)
        outputs = run(engine, *(ask(name, PROMPTS[0], name) for name in paths))
        assert sum(o[-1].error is None for o in outputs.values()) == 1
        [error] = [o[-1].error for o in outputs.values() if o[-1].error]
        assert str(error).endswith("could not be loaded: MemoryError: ")
    outputs = run(engine, *(ask(name, PROMPTS[0], name) for name in paths))
    assert all(tokens_of(o) for o in outputs.values())
    check_idle(engine)


@pytest.mark.parametrize("max_loras", [1, 2])
def test_aborts_in_every_state_leave_nothing_behind(
    checkpoint: Path, model: Model, tmp_path: Path, max_loras: int
) -> None:
    """Cancel a third of the requests at any time, with more adapters than slots and few pages."""
    paths = adapter_paths(checkpoint, tmp_path, 5)
    engine = make_engine(model, paths, max_loras=max_loras, max_num_seqs=4, kv_cache_memory=1 << 16)
    random = Random(0)
    finished: dict[str, str | None] = {}
    names = [*paths, None]
    for i in range(120):
        engine.add_request(ask(f"r{i}", PROMPTS[i % 2], random.choice(names), max_tokens=6))
        if random.random() < 0.4:
            engine.abort([f"r{random.randrange(i + 1)}"])
        for output in engine.step() if random.random() < 0.7 else []:
            finished[output.request_id] = output.finish_reason
        engine.check()
    while engine.has_work():
        for output in engine.step():
            finished[output.request_id] = output.finish_reason
    assert len(finished) == 120
    assert set(finished.values()) == {"length", "abort"}
    check_idle(engine)
    fresh = run(engine, ask("fresh", PROMPTS[0], "a3"))["fresh"]
    alone = make_engine(model, {"a3": paths["a3"]})
    assert tokens_of(fresh) == tokens_of(run(alone, ask("x", PROMPTS[0], "a3"))["x"])


def test_a_large_adapter_gets_its_turn_among_small_ones(
    checkpoint: Path, model: Model, tmp_path: Path
) -> None:
    """It needs the room of all others together, and they are asked for without a pause."""
    paths = adapter_paths(checkpoint, tmp_path, 2)
    paths["large"] = random_adapter(tmp_path / "large", checkpoint, 9, rank=8)
    sizes = [lora.size for lora in pool_of(make_engine(model, paths)).names.values()]
    engine = make_engine(model, paths, max_loras=3, lora_memory=4 * sizes[2])
    assert sum(sizes) > sizes[2]
    waits = {}
    for i in range(60):
        for name in ("a0", "a1"):
            engine.add_request(ask(f"{name}.{i}", PROMPTS[0], name, max_tokens=8))
        if i % 20 == 5:
            engine.add_request(ask(f"large.{i}", PROMPTS[0], "large"))
        wait(pool_of(engine)._copies.values())  # a thread may wait for a core longer than a step
        for output in engine.step():
            if output.finish_reason and output.request_id.startswith("large"):
                waits[output.request_id] = i - int(output.request_id.split(".")[1])
    assert len(waits) == 3, waits
    while engine.has_work():
        engine.step()
    check_idle(engine)
