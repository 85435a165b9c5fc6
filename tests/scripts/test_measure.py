"""What scripts/measure.sh does around its stages, which need a GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from headrace.files import BUNDLED_MODEL

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure.sh"


def test_a_stage_that_fails_ends_no_other_and_is_named_last(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out", "no-such-stage", "checkpoint"],
        env={**os.environ, "MODEL": str(BUNDLED_MODEL)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    told = run.stdout.splitlines()
    assert "no-such-stage: command not found" in told[1]
    assert [told[0], told[3], told[-1]] == [
        "== no-such-stage",
        "== checkpoint",
        "== failed: no-such-stage",
    ]
    assert (tmp_path / "out" / "checkpoint.log").read_text() == ""
