"""The tree keeps its shape: imports go one way, files stay small, tests mirror the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "headrace"

# A package may import the packages to its left, and the leaves; nothing imports upward.
LAYERS = ["ops", "models", "lora", "engine", "server"]
LEAVES = {"config", "files", "__init__"}
TOP = {"__main__", "cli", "flags", "doctor", "generate", "bench", "eval", "data"}
# Large kernels are one idea even when long.
MAX_LINES = 400


def layer_of(module: str) -> str:
    """headrace.ops.norm -> ops; headrace.config -> config; headrace -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "headrace":
                yield from (f"headrace.{alias.name}" for alias in node.names)


def upward_imports(path: Path, source: str) -> list[str]:
    """The imports of one file that the order of layers forbids."""
    own = path.relative_to(SRC).parts[0].removesuffix(".py")
    found = [m for m in imports_of(source) if m.split(".")[0] in ("headrace", "tests", "pytest")]
    if own in TOP:
        return [m for m in found if not m.startswith("headrace")]
    allowed = LEAVES | (set(LAYERS[: LAYERS.index(own) + 1]) if own in LAYERS else set())
    if own == "models":
        allowed -= {"lora"}
    return [m for m in found if not m.startswith("headrace") or layer_of(m) not in allowed]


def sources() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_one_way(path: Path) -> None:
    assert upward_imports(path, path.read_text()) == []


def test_an_upward_import_is_found() -> None:
    bad = "from headrace.engine.engine import Engine\nimport pytest\n"
    found = upward_imports(SRC / "ops" / "norm.py", bad)
    assert found == ["headrace.engine.engine", "pytest"]


def test_files_hold_one_idea() -> None:
    long = [p for p in sources() if len(p.read_text().splitlines()) > MAX_LINES]
    assert [str(p) for p in long if not p.stem.endswith("_kernel")] == []


def test_every_test_file_has_its_source() -> None:
    """tests/ops/test_norm.py tests src/headrace/ops/norm.py."""
    stray = [
        str(test.relative_to(ROOT))
        for package in ("ops", "models")
        for test in (ROOT / "tests" / package).glob("test_*.py")
        if not (SRC / package / f"{test.stem.removeprefix('test_')}.py").exists()
        and test.stem != "test_oracles"
        and not test.stem.endswith("_compile")
    ]
    assert stray == []
