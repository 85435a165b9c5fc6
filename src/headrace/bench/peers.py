"""What other servers measured, from peers.json: looked up by model, GPU and workload."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from headrace.models.config import GptOssConfig


def peer_rows(kind: str, config: GptOssConfig, gpu: str | None) -> list[dict[str, Any]]:
    """Rows of one kind (latency, serve or startup), none for another model or GPU than theirs.

    gpu is the short name, such as H100; columns are those of the CSV of that kind.
    """
    peers = json.loads((resources.files("headrace") / "bench" / "peers.json").read_text())
    same_model = all(getattr(config, field) == size for field, size in peers["model"].items())
    rows: list[dict[str, Any]] = peers[kind]
    return rows if same_model and gpu == peers["source"]["gpu"] else []


def find_row(rows: list[dict[str, Any]], **workload: Any) -> dict[str, Any] | None:
    """The row whose columns have these values."""
    return next((r for r in rows if all(r[c] == v for c, v in workload.items())), None)
