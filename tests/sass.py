"""What a kernel compiled for Hopper does with the registers of its matrix instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator

LABEL = re.compile(r"\s*(\S+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
IF = r"(?:@!?U?P[\dT] )?"
JUMP = re.compile(IF + r"(?:BRA|CALL|WARPSYNC)\b.* `\((\S+)\)")
END = re.compile(r"EXIT|RET|BRA `")  # with no IF: the next instruction isn't run
PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)")
WRITE = re.compile(IF + r"(?!BAR|FCHK|RET|WARPSYNC)([A-Z]\S*) (?:P[\dT], )?R(\d+)\b")
FOUR = re.compile(r"HMMA|\S*\.(128\b|M\w+\.4$)")
TWO = re.compile(r"CS2R$|D[AFM]|[FI]2F\.F64|F2I\.[SU]64|\S*\.(64\b|WIDE|M\w+\.2$)")
MOST_GROUPS = 16  # followed: ptxas lets no more than 8 be under way

Groups = tuple[tuple[int, ...], ...]  # first register of each product; the last group is open


def youngest_overwritten(sass: str) -> int | None:
    """The least age, over all paths, of a product whose first operand's registers are written.

    Age: number of products issued after it. None if no such registers are written while it is under
    way: issued (wgmma with its first operand in registers) and not waited for. It reads them some
    time after it was issued and only a wait tells that it has, but ptxas gives them away before.
    On an H100 results were wrong at age 0 and never at 1 or more.

    sass: one kernel, as `nvdisasm -c` prints it.
    """
    instructions, labels = _parse(sass)
    todo: list[tuple[int, Groups]] = [(0, ((),))]
    seen = set(todo)
    ages: set[int] = set()
    while todo:
        at, groups = todo.pop()
        text = instructions[at]
        ages |= set(_overwritten(groups, _written(text)))
        groups = _after(groups, text)
        jump = JUMP.match(text)
        targets = [labels[jump[1]]] if jump else []
        if not END.match(text):
            targets.append(at + 1)
        fresh = {(target, groups) for target in targets} - seen
        seen |= fresh
        todo += fresh
    return min(ages, default=None)


def _parse(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and the place of each label among them."""
    instructions: list[str] = []
    labels = {}
    for line in sass.splitlines():
        if found := INSTRUCTION.match(line):
            instructions.append(found[1])
        elif found := LABEL.match(line):
            labels[found[1]] = len(instructions)
    return instructions, labels


def _after(groups: Groups, text: str) -> Groups:
    """The groups under way once this instruction has been issued."""
    if wait := WAIT.match(text):
        return groups[-1 - int(wait[1], 16) :]
    if product := PRODUCT.match(text):
        groups = (*groups[:-1], (*groups[-1], int(product[1])))
    if text.startswith("HGMMA") and text.endswith("gsb0"):  # ends its group
        groups = (*groups[-MOST_GROUPS:], ())
    return groups


def _overwritten(groups: Groups, written: range) -> Iterator[int]:
    """Ages of the products that read 4 registers of which one is written."""
    products = [first for group in groups for first in group]
    for age, first in enumerate(reversed(products)):
        if first < written.stop and written.start < first + 4:
            yield age


def _written(text: str) -> range:
    """Registers that an instruction writes; none for a product, which does so in order."""
    write = WRITE.match(text)
    if not write or write[1].startswith("HGMMA"):
        return range(0)
    name, first = write[1], int(write[2])
    width = 4 if FOUR.match(name) else 2 if TWO.match(name) else 1
    return range(first, first + width)
