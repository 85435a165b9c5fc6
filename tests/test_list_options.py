from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from headrace.flags import ListOptions

app = typer.Typer()


@app.command(cls=ListOptions)
def show(
    first: Annotated[str, typer.Argument()] = "-",
    names: Annotated[list[str] | None, typer.Option()] = None,
    size: Annotated[int, typer.Option()] = 1,
) -> None:
    print(first, names, size)


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        ("--names a b --size 3", "- ['a', 'b'] 3"),
        ("--names a --names b c", "- ['a', 'b', 'c'] 1"),
        ("--names=a --names b", "- ['a', 'b'] 1"),
        ("x --size 3 --names a b", "x ['a', 'b'] 3"),
        ("--size 3 x", "x None 3"),
    ],
)
def test_lists_are_spread(args: str, shown: str) -> None:
    assert CliRunner().invoke(app, args.split()).output.strip() == shown


def test_what_takes_one_value_takes_one() -> None:
    assert CliRunner().invoke(app, ["x", "--size", "3", "4"]).exit_code == 2
