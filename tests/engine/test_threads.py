"""A small checkpoint computes on one thread, unless the user says otherwise."""

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.engine.threads import SMALL_CHECKPOINT


def num_threads(checkpoint: Path, env: dict[str, str]) -> int:
    code = (
        "import sys, torch; from pathlib import Path; "
        "from headrace.engine.threads import set_cpu_threads; torch.set_num_threads(2); "
        "set_cpu_threads(Path(sys.argv[1])); print(torch.get_num_threads())"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    return int(subprocess.run(command, env=env, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    ("size", "env", "expected"),
    [
        (1024, {}, 1),
        (SMALL_CHECKPOINT + 1, {}, 2),
        (1024, {"OMP_NUM_THREADS": "2"}, 2),
    ],
)
def test_threads(tmp_path: Path, size: int, env: dict[str, str], expected: int) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(size)  # sparse: takes no space
    assert num_threads(tmp_path, env) == expected
