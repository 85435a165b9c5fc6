"""docs/measured.md says what the CSV files say, and its generator leaves the rest alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.measured import ROOT, filled

CSV = "users,a_ms,b_ms,adapters\n1,3.0,2,0\n8,4.5,,0\n8,9,3,2\n"
DOCUMENT = """# Title
<!-- table t.csv where adapters=0 | users | a_ms: ours, ms | a_ms/b_ms: ours / peer -->
| an old table |
<!-- end -->
written by hand
<!-- table none.csv | users -->
<!-- end -->
"""
FILLED = """# Title
<!-- table t.csv where adapters=0 | users | a_ms: ours, ms | a_ms/b_ms: ours / peer -->

| users | ours, ms | ours / peer |
| --- | --- | --- |
| 1 | 3.0 | 1.50 |
| 8 | 4.5 |  |

<!-- end -->
written by hand
<!-- table none.csv | users -->

Not measured yet.

<!-- end -->
"""


def test_the_documents_tables_are_those_of_the_files() -> None:
    text = (ROOT / "docs" / "measured.md").read_text()
    assert text.count("<!-- table ") >= 4
    assert filled(text, ROOT) == text, "run python scripts/measured.py"


def test_sections_are_filled_and_filled_again(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    assert filled(DOCUMENT, tmp_path) == FILLED
    assert filled(FILLED, tmp_path) == FILLED


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    with pytest.raises(ValueError, match="no column c_ms; it has users, a_ms"):
        filled(DOCUMENT.replace("a_ms/b_ms", "a_ms/c_ms"), tmp_path)
