"""Flags are made from the configuration's fields, and wrong values are one clear line."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from headrace.config import ConfigError, EngineConfig, flag
from headrace.flags import ListOptions, with_configs


@dataclass(frozen=True)
class Sample:
    size: int = flag(3, "a size")
    names: tuple[str, ...] = flag((), "some names")
    fast: bool = flag(True, "go fast")


def make_app(seen: list[Sample]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @with_configs(sample=Sample)
    def run(word: str, *, sample: Sample) -> None:
        seen.append(sample)
        assert word == "hello"

    return app


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], Sample()),
        (["--size", "5", "--names", "a", "--names", "b"], Sample(5, ("a", "b"))),
        (["--no-fast"], Sample(fast=False)),
    ],
)
def test_flags_build_the_config(args: list[str], expected: Sample) -> None:
    seen: list[Sample] = []
    result = CliRunner().invoke(make_app(seen), ["hello", *args])
    assert result.exit_code == 0, result.output
    assert seen == [expected]


def test_unknown_flag_is_a_usage_error() -> None:
    assert CliRunner().invoke(make_app([]), ["hello", "--sise", "5"]).exit_code == 2


def test_out_of_range_names_flag_value_and_range() -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs is 0; it must be at least 1"):
        EngineConfig(max_num_seqs=0)


def headrace(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from headrace.cli import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("serve", "no/such/directory"), "no/such/directory"),
        (("serve", "--max-num-seqs", "0"), "--max-num-seqs is 0"),
        (("serve", "--generation-config", "vllm"), "'vllm'; it must be one of auto, none"),
        (("generate", "hi", "--device", "tpu"), "tpu"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(args: tuple[str, ...], words: str) -> None:
    result = headrace(*args)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_doctor_shows_what_fits() -> None:
    result = headrace("doctor")
    assert result.returncode == 0, result.stderr
    assert "gpt-oss-20b" in result.stdout


lists = typer.Typer()


@lists.command(cls=ListOptions)
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
    assert CliRunner().invoke(lists, args.split()).output.strip() == shown


def test_what_takes_one_value_takes_one() -> None:
    assert CliRunner().invoke(lists, ["x", "--size", "3", "4"]).exit_code == 2
