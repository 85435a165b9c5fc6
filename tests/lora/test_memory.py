"""Ranges and tables of the adapters' memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import ConfigError
from headrace.lora.adapter import Adapter
from headrace.lora.check import ROWS, check_adapter, make_trial, sites_of
from headrace.lora.memory import LoraMemory, Placement, Ranges, full_size, sizes_of
from headrace.lora.rows import row_arrays
from headrace.lora.targets import model_sites
from headrace.models import Model, load_model
from headrace.ops.lora import ALIGNMENT, LoraWeights
from tests.checkpoints import random_checkpoint
from tests.lora.adapted import read
from tests.lora.random_adapters import random_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(random_checkpoint(tmp_path_factory.mktemp("base"), seed=2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_ranges_never_overlap_and_merge_again(moves: list[tuple[bool, int]]) -> None:
    ranges, held = Ranges(100), []
    for take, size in moves:
        if take:
            begin = ranges.take(size)
            longest = max((end - start for start, end in ranges.free), default=0)
            assert begin is not None or longest < size
            if begin is not None:
                held.append((begin, size))
        elif held:
            ranges.give_back(*held.pop(size % len(held)))
        used = {i for begin, size in held for i in range(begin, begin + size)}
        assert len(used) == sum(size for _, size in held)
        free = {i for begin, end in ranges.free for i in range(begin, end)}
        assert not used & free
        assert used | free == set(range(100))
        assert ranges.num_free == len(free)
    for one in held:
        ranges.give_back(*one)
    assert ranges.free == [(0, 100)]


def make_memory(model: Model, num_elements: int, dtype: torch.dtype = torch.float32) -> LoraMemory:
    sites = model_sites(model.config)
    return LoraMemory(sites, 3, 8, num_elements, dtype, torch.device("cpu"))


def test_an_adapter_takes_what_its_own_rank_needs(model: Model, tmp_path: Path) -> None:
    checkpoint = tmp_path / "base"
    random_checkpoint(checkpoint, seed=2)
    adapters = [
        read(model, random_adapter(tmp_path / f"{rank}", checkpoint, rank, rank=rank))
        for rank in (1, 8)
    ]
    small, large = (sum(sizes_of(a.factors).values()) for a in adapters)
    keys = adapters[1].factors.keys()
    targets = [t for site in model_sites(model.config) for t in site.targets if t.key in keys]
    assert large == full_size(targets, 8)
    assert small < large / 5
    memory = make_memory(model, small + large)
    placements = [memory.place(sizes_of(a.factors)) for a in adapters]
    assert all(placements)
    assert memory.ranges.num_free == 0
    assert memory.place(sizes_of(adapters[0].factors)) is None
    assert placements[1] is not None
    memory.free(placements[1])
    assert memory.ranges.num_free == large
    for begin in placements[1].a.values():
        assert begin % ALIGNMENT == 0


def alone_in_memory(
    model: Model, adapter: Adapter, dtype: torch.dtype = torch.float32
) -> tuple[LoraMemory, Placement, LoraWeights]:
    sizes = sizes_of(adapter.factors)
    memory = make_memory(model, sum(sizes.values()), dtype)
    placement = memory.place(sizes)
    assert placement is not None
    memory.write(placement, adapter.factors)
    return memory, placement, memory.alone(1, placement, adapter.factors)


def test_the_check_finds_memory_that_is_wrong(model: Model, tmp_path: Path) -> None:
    checkpoint = tmp_path / "base"
    random_checkpoint(checkpoint, seed=2)
    adapter = read(model, random_adapter(tmp_path / "a", checkpoint, 0, everything=True))
    memory, placement, alone = alone_in_memory(model, adapter)
    assert "self-check of" in check_adapter(alone, memory.sites, 1, adapter)
    assert not memory.weights.lm_head.rank.any()  # nothing is published yet
    for key, begin in placement.a.items():
        values = alone.memory[begin : begin + adapter.factors[key].a.numel()]
        for wrong in (-values, values * torch.nan):
            right = values.clone()
            values.copy_(wrong)
            with pytest.raises(ConfigError, match=key):
                check_adapter(alone, memory.sites, 1, adapter)
            values.copy_(right)


def test_the_check_takes_terms_that_cancel_out(model: Model, tmp_path: Path) -> None:
    """As PEFT's orthogonal start does: A^T B is 0, which float32 misses by as much as it rounds."""
    checkpoint = tmp_path / "base"
    random_checkpoint(checkpoint, seed=2)
    adapter = read(model, random_adapter(tmp_path / "a", checkpoint, 0, everything=True))
    factors = {
        key: replace(f, a=torch.cat((f.a, f.a / 3), 1), b=torch.cat((f.b, f.b * -3), 1))
        for key, f in adapter.factors.items()
    }
    adapter = replace(adapter, factors=factors)
    memory, _, alone = alone_in_memory(model, adapter)
    assert "self-check of" in check_adapter(alone, memory.sites, 1, adapter)


def test_the_check_takes_an_a_that_its_x_hardly_meets(model: Model, tmp_path: Path) -> None:
    """At rank 1 x A^T may be near 0, which bfloat16 misses by as much as it rounds a float32 A."""
    checkpoint = tmp_path / "base"
    random_checkpoint(checkpoint, seed=2)
    adapter = read(model, random_adapter(tmp_path / "a", checkpoint, 0, rank=1))
    weights = make_memory(model, 0, torch.bfloat16).weights
    factors = dict(adapter.factors)
    for site, targets in zip(sites_of(weights), model_sites(model.config), strict=True):
        for key in (t.key for t in targets.targets if t.key in factors):
            x = make_trial(site, weights).x[0][: ROWS - 1].double()
            met, f = torch.linalg.qr(x.T)[0], factors[key]
            a = f.a - f.a.double() @ met @ met.T * 0.999
            factors[key] = replace(f, a=a.float())
    adapter = replace(adapter, factors=factors)
    memory, placement, alone = alone_in_memory(model, adapter, torch.bfloat16)
    assert "self-check of" in check_adapter(alone, memory.sites, 1, adapter)
    key, begin = next(iter(placement.a.items()))
    alone.memory[begin] += 1
    with pytest.raises(ConfigError, match=key):
        check_adapter(alone, memory.sites, 1, adapter)


def test_rows_by_adapter() -> None:
    """The worked example of LoraRows."""
    slots, order, active, starts = row_arrays(np.array([2, -1, 0, 2]), 4)
    assert slots.tolist() == [2, -1, 0, 2]
    assert order.tolist() == [2, 0, 3, 1]
    assert active.tolist() == [0, 2, -1, -1]
    assert starts.tolist() == [0, 1, 3, 3, 3]
    assert {a.dtype for a in (slots, order, active, starts)} == {np.dtype("int32")}
