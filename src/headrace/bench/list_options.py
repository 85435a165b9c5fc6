"""Options that take several values after one name, as `--goodput ttft:200 tpot:50`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


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
