"""Every path, headrace symbol and benchmark that the documents name exists."""

import importlib
import re
from pathlib import Path

import pytest
import typer

from headrace.bench.commands import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [ROOT / "scripts" / "measure.sh"]
PATH = re.compile(
    r"`((?:src|tests|docs|bench|scripts|\.ci)/[\w./-]+|Makefile|[\w-]+\.(?:toml|txt|md))`"
)
SYMBOL = re.compile(r"`(headrace(?:\.\w+)+)(?:\(.*?\))?`")
BENCHMARK = re.compile(r"headrace bench ([a-z][a-z-]*)")


def missing_paths(text: str) -> list[str]:
    return [p for p in PATH.findall(text) if not (ROOT / p).exists()]


def missing_symbols(text: str) -> list[str]:
    return [s for s in SYMBOL.findall(text) if not resolves(s)]


def missing_benchmarks(text: str) -> list[str]:
    known = typer.main.get_group(app).commands
    return [name for name in BENCHMARK.findall(text) if name not in known]


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_paths_and_symbols_exist(document: Path) -> None:
    text = document.read_text()
    assert missing_paths(text) == []
    assert missing_symbols(text) == []


@pytest.mark.parametrize("file", DOCUMENTS + SCRIPTS, ids=lambda p: p.name)
def test_named_benchmarks_exist(file: Path) -> None:
    assert missing_benchmarks(file.read_text()) == []


def test_wrong_names_are_found() -> None:
    text = "`src/headrace/nothing.py` and `headrace.config.NoSuchThing` but `headrace.config.flag`"
    assert missing_paths(text) == ["src/headrace/nothing.py"]
    assert missing_symbols(text) == ["headrace.config.NoSuchThing"]
    text = "`headrace bench kernels`, then headrace bench tune-nothing --out"
    assert missing_benchmarks(text) == ["tune-nothing"]
