"""Fill the tables of docs/measured.md from the CSV files: python scripts/measured.py [--check]

A table stands between two comments; the first says where it comes from, and what is in it:

    <!-- table bench/results/h100/serve.csv where adapters=0 | users | output_tok_s: tok/s -->
    <!-- end -->

A column is a column of the file, or a ratio `a/b` of two, and after a colon its title. All other
text is left as it is.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.compile(
    r"<!-- table (\S+)(?: where (\S+))? \| (.*?) -->\n(.*?)<!-- end -->", re.DOTALL
)
NOT_MEASURED = "Not measured yet.\n"


def filled(text: str, root: Path) -> str:
    """Return a document with every table made anew. Raises ValueError for an unknown column."""

    def fill(match: re.Match[str]) -> str:
        file, condition, columns, _ = match.groups()
        opening = match[0].partition("-->\n")[0]
        body = (
            make_table(root / file, condition, columns) if (root / file).exists() else NOT_MEASURED
        )
        return f"{opening}-->\n\n{body}\n<!-- end -->"

    return SECTION.sub(fill, text)


def make_table(path: Path, condition: str | None, columns: str) -> str:
    """Return a table in Markdown."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if condition:
        column, _, wanted = condition.partition("=")
        rows = [row for row in rows if row[column] == wanted]
    specs = [column.strip().partition(":") for column in columns.split(" | ")]
    titles = [title.strip() or name for name, _, title in specs]
    lines = [titles, ["---"] * len(titles)]
    lines += [[cell(path, row, name.strip()) for name, _, _ in specs] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(path: Path, row: dict[str, str], column: str) -> str:
    """Return a column of the file as it stands there, a ratio with two digits, nothing for none."""
    parts = column.split("/")
    unknown = [part for part in parts if part not in row]
    if unknown:
        raise ValueError(f"{path} has no column {unknown[0]}; it has {', '.join(row)}")
    if len(parts) == 1:
        return row[column]
    above, below = (row[part] for part in parts)
    return f"{float(above) / float(below):.2f}" if above and below else ""


def main() -> int:
    """Rewrite the document; with --check only say whether it would change."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true")
    check = options.parse_args().check
    path = ROOT / "docs" / "measured.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old, ROOT)
    if not check:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{path} is not what the CSV files say: run python scripts/measured.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
