"""The registers of matrix instructions, in SASS written by hand."""

from __future__ import annotations

import pytest

from tests.sass import youngest_overwritten

PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R{}, gdesc[UR12], R24{}"
FIRST = PRODUCT.format(32, ", gsb0")  # reads R32 to R35
SECOND = PRODUCT.format(36, ", gsb0")
THIRD = PRODUCT.format(40, ", gsb0")
OPEN = PRODUCT.format(32, "")  # its group goes on
FROM_MEMORY = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR12], R24, gsb0"
OVERWRITE = "LOP3.LUT R35, R16, 0xc000c0, R41, 0xf8, !PT"
AGAIN = "@P0 BRA `(.L_x_0)"


def wait(left: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {left:#x}"


def age(*lines: str) -> int | None:
    """Of lines that are labels or instructions."""
    text = ["kernel:"]
    for number, line in enumerate([*lines, "EXIT", "NOP"]):
        label = line.endswith(":")
        text.append(line if label else f"        /*{number * 16:04x}*/                   {line} ;")
    return youngest_overwritten("\n".join(text))


def test_age_counts_products_issued_since() -> None:
    assert age(FIRST, OVERWRITE) == 0
    assert age(FIRST, SECOND, OVERWRITE) == 1
    assert age(FIRST, SECOND, FROM_MEMORY, OVERWRITE) == 1  # which reads no registers
    assert age(FIRST, SECOND, OVERWRITE, THIRD, "MOV R40, R3") == 0
    assert age(FIRST, SECOND, THIRD) is None
    assert age(OVERWRITE, FIRST) is None
    assert age(FIRST, "LOP3.LUT R31, R32, R33, R34, 0xf8, !PT", "MOV R36, R35") is None


def test_a_wait_leaves_the_youngest_groups_under_way() -> None:
    assert age(FIRST, wait(0), OVERWRITE) is None
    assert age(FIRST, wait(1), OVERWRITE) == 0
    assert age(FIRST, SECOND, wait(1), OVERWRITE) is None
    assert age(FIRST, SECOND, wait(1), "MOV R36, R3") == 0
    assert age(FIRST, FROM_MEMORY, wait(1), OVERWRITE) is None
    assert age(OPEN, SECOND, wait(1), OVERWRITE) == 1  # one group
    assert age(OPEN, wait(0), OVERWRITE) == 0  # not in a group that has ended


@pytest.mark.parametrize(
    ("instruction", "first", "num_registers"),
    [
        ("IMAD.MOV.U32 R{}, RZ, RZ, R3", 50, 1),
        ("SHF.R.U64 R{}, R2, 0x4, R3", 50, 1),
        ("@!P1 IADD3 R{}, P0, R4, R3, RZ", 50, 1),
        ("@!PT SHFL.BFLY PT, R{}, R6, 0x1, 0x1f", 50, 1),
        ("LOP3.LUT P0, R{}, R2, 0x1, RZ, 0xc0, !PT", 50, 1),
        ("LDSM.16.M88 R{}, [R4]", 50, 1),
        ("CS2R R{}, SRZ", 50, 2),
        ("IMAD.WIDE.U32 R{}, R2, 0x4, R6", 50, 2),
        ("LDG.E.64.STRONG.GPU R{}, desc[UR6][R2.64]", 50, 2),
        ("F2I.S64.TRUNC R{}, R2", 50, 2),
        ("LDSM.16.MT88.2 R{}, [R4]", 50, 2),
        ("LDS.128 R{}, [R8+0x4000]", 52, 4),
        ("LDG.E.128.STRONG.GPU R{}, desc[UR6][R2.64]", 52, 4),
        ("LDSM.16.M88.4 R{}, [R4]", 52, 4),
        ("HMMA.16816.F32.BF16 R{}, R4, R8, R12", 52, 4),
    ],
)
def test_registers_written(instruction: str, first: int, num_registers: int) -> None:
    """Just these: not what a product right before or after them reads."""
    write = instruction.format(first)
    end = first + num_registers
    assert age(PRODUCT.format(end - 1, ", gsb0"), write) == 0
    assert age(PRODUCT.format(end, ", gsb0"), write) is None
    assert age(PRODUCT.format(first - 3, ", gsb0"), write) == 0
    assert age(PRODUCT.format(first - 4, ", gsb0"), write) is None


@pytest.mark.parametrize(
    "instruction",
    [
        "STS.128 [R32], R32",
        "@P0 STG.E.64 desc[UR6][R32.64], R34",
        "LDGSTS.E.BYPASS.128 [R33+0x4000], desc[UR6][R32.64]",
        "ISETP.LE.AND P3, PT, R33, UR4, PT",
        "FCHK P0, R32, R33",
        "R2UR UR4, R33",
        "R2P PR, R33, 0x7f",
        "RED.E.ADD.STRONG.GPU desc[UR6][R32.64], R33",
        "BAR.SYNC R33, R34",
    ],
)
def test_instructions_that_write_no_register(instruction: str) -> None:
    assert age(FIRST, instruction) is None


def test_loops_are_followed_around() -> None:
    assert age(".L_x_0:", OVERWRITE, FIRST, AGAIN) == 0
    assert age(".L_x_0:", OVERWRITE, FIRST, SECOND, AGAIN) == 1
    assert age(".L_x_0:", OVERWRITE, FIRST, wait(0), AGAIN) is None
    assert age(".L_x_0:", OVERWRITE, FIRST, AGAIN, wait(0)) == 0
    assert age(".L_x_0:", FIRST, AGAIN, OVERWRITE) == 0  # after its last step


def test_every_path_is_followed() -> None:
    skip = "@!P1 BRA `(.L_x_1)"
    assert age(FIRST, skip, SECOND, ".L_x_1:", OVERWRITE) == 0
    assert age(FIRST, skip, wait(0), ".L_x_1:", OVERWRITE) == 0
    assert age(FIRST, skip, OVERWRITE, ".L_x_1:", wait(0)) == 0
    assert age(FIRST, SECOND, skip, wait(0), ".L_x_1:", OVERWRITE) == 1
    assert age(FIRST, "BRA `(.L_x_1)", OVERWRITE, ".L_x_1:", wait(0)) is None
    assert age(FIRST, "EXIT", OVERWRITE) is None
    assert age(FIRST, "@P0 EXIT", OVERWRITE) == 0
    inner = [".L_x_0:", OVERWRITE, skip, wait(0), ".L_x_1:", FIRST, AGAIN]
    assert age(*inner) == 0
    called = ["CALL.REL.NOINC `($slow)", wait(0), "EXIT", "$slow:", OVERWRITE, "RET.REL.NODEC R2"]
    assert age(FIRST, *called) == 0
