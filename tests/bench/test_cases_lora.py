"""The adapters that `headrace bench kernels` times, against the reference op."""

import torch

from headrace.bench.cases_lora import QKV_WIDTHS, exact_delta, random_adapters, rows_of
from headrace.ops.lora import add_lora

CPU = torch.device("cpu")


def test_exact_delta_is_what_the_reference_adds(monkeypatch) -> None:
    monkeypatch.setattr("headrace.bench.cases_lora.HIDDEN", 64)
    monkeypatch.setattr("headrace.bench.cases_lora.INTER", 32)
    monkeypatch.setattr("headrace.bench.cases_lora.NUM_EXPERTS", 2)
    adapters = random_adapters(3, 4, CPU)
    site, memory = adapters.layer.qkv, adapters.memory.float()
    slots = torch.tensor([2, -1, 0])
    x = torch.randn(3, 64)
    got = add_lora(torch.zeros(3, sum(QKV_WIDTHS)), x, site, memory, rows_of(slots, 3, CPU))
    expected = torch.cat([exact_delta(x.double(), site, s, memory, slots) for s in range(3)], 1)
    assert got[0].abs().max() > 0.05
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
