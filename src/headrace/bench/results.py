"""Rows of a benchmark: as a CSV file, and the best of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from headrace.config import ConfigError

Row = TypeVar("Row")


def fastest(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Of rows with equal keys the one with the least `us`, the first if there are several."""
    best: dict[tuple[str, ...], tuple[float, Row]] = {}
    for row in rows:
        values = vars(row)
        key, us = _key(values, keys), values["us"]
        if key not in best or us < best[key][0]:
            best[key] = us, row
    return [row for _, row in best.values()]


def write_csv(path: Path, rows: Sequence[Any], keys: Sequence[str] = ()) -> None:
    """Write dataclass instances, a column a field; None is nothing, floats have 5 digits.

    With keys, rows that the file has already stay, but for those whose keys a new row has too.
    Raises ConfigError for a file with other columns.
    """
    columns = [f.name for f in fields(rows[0])]
    new = [{name: _short(value) for name, value in asdict(row).items()} for row in rows]
    found = {_key(row, keys) for row in new}
    old = [row for row in _read(path, columns) if _key(row, keys) not in found] if keys else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + new)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _read(path: Path, columns: list[str]) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise ConfigError(f"{path} has columns {reader.fieldnames}; give another file")
        return list(reader)


def _key(row: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in keys)
