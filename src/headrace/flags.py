"""Command-line flags made from the fields of the configuration dataclasses.

Those that hold a list take several values after one name, as `--goodput ttft:200 tpot:50`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand

from headrace.config import flag_name


def with_configs(**configs: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a typer command take whole configs: `name=Type` adds a flag for each field of Type.

    The command is called with one built instance of each config, under its name. A field that the
    command already has as an argument of its own is taken from there.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = {n: p for n, p in signature.parameters.items() if n not in configs}
        flags: dict[str, inspect.Parameter] = {}
        for config in configs.values():
            hints = get_type_hints(config)
            for f in fields(config):
                if f.name not in own:
                    flags[f.name] = _parameter(f, hints[f.name])

        @functools.wraps(command)
        def run(**values: Any) -> None:
            built = {
                name: config(**{f.name: _value(f, values[f.name]) for f in fields(config)})
                for name, config in configs.items()
            }
            command(**built, **{n: values[n] for n in own if n not in _field_names(configs)})

        run.__signature__ = signature.replace(parameters=[*own.values(), *flags.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own.values(), *flags.values())}
        return run

    return decorate


class ListOptions(TyperCommand):
    """A command whose repeatable options also take lists; its arguments come before them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write `--name a b` as `--name a --name b`, which click knows, before it parses."""
        lists = {n for p in self.params if getattr(p, "multiple", False) for n in p.opts}
        spread: list[str] = []
        name = ""  # of the list whose values may go on
        for arg in args:
            if arg.startswith("-"):
                name = ""
            elif name and spread[-1] != name:
                spread.append(name)
            spread.append(arg)
            name = arg if arg in lists else name
        return super().parse_args(ctx, spread)


def _field_names(configs: dict[str, type]) -> set[str]:
    return {f.name for config in configs.values() for f in fields(config)}


def _parameter(f: Field[Any], hint: Any) -> inspect.Parameter:
    assert f.default is not MISSING, f"flag {f.name} needs a default"
    is_list = hint == tuple[str, ...]
    names = [flag_name(f)] + (["--no-" + flag_name(f)[2:]] if hint is bool else [])
    spelling = "/".join(names)
    return inspect.Parameter(
        f.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(list(f.default) if is_list else f.default, spelling, help=_help(f)),
        annotation=list[str] if is_list else hint,
    )


def _help(f: Field[Any]) -> str:
    return str(f.metadata["help"])


def _value(f: Field[Any], value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
