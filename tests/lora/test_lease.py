"""Files that nobody changes while they are mapped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.config import ConfigError
from headrace.lora.lease import Lease

CUT = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(b'')"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("ab"):
        try:
            Lease(path).end()
        except ConfigError:
            return path
    pytest.skip("no leases in this file system")


def test_who_would_cut_a_file_short_waits(file: Path) -> None:
    lease = Lease(file)
    cut = subprocess.Popen([sys.executable, "-c", CUT, file])
    with pytest.raises(subprocess.TimeoutExpired):
        cut.wait(1)
    assert file.read_bytes() == b"x"
    lease.end()
    assert cut.wait(120) == 0
    assert file.read_bytes() == b""


def test_two_may_read_and_one_may_take_its_place(file: Path, tmp_path: Path) -> None:
    leases = [Lease(file), Lease(file)]
    other = tmp_path / "other"
    other.write_bytes(b"y")
    other.rename(file)
    assert file.read_bytes() == b"y"
    for lease in leases:
        lease.end()
        lease.end()


def test_a_file_that_is_being_written_is_refused(file: Path) -> None:
    with file.open("ab"), pytest.raises(ConfigError, match="is being written"):
        Lease(file)
    Lease(file).end()


def test_a_lost_lease_ends(file: Path) -> None:
    Lease(file)
    file.write_bytes(b"")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lease(tmp_path / "nowhere")


# A page that is gone ends the process: so the loads are in one of their own.
LOADS = """
import subprocess, sys
from pathlib import Path
from headrace.bench.synth_adapter import write_adapter
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import LoadAdapter
from headrace.files import BUNDLED_MODEL
from headrace.models.config import read_config

path = Path(sys.argv[1])
write_adapter(path, read_config(BUNDLED_MODEL), 256, seed=0)
engine = Engine(
    EngineConfig(
        **{"model": BUNDLED_MODEL, "device": "cpu", "kv_cache_memory": 64 << 20},
        **{"enable_lora": True, "max_loras": 1, "max_lora_rank": 256},
    )
)
overwrite = '''
import sys, time
from pathlib import Path
file, end = Path(sys.argv[1]), time.monotonic() + 4
data = file.read_bytes()
while time.monotonic() < end:
    file.write_bytes(data)
    time.sleep(0.05)
'''
writer = subprocess.Popen([sys.executable, "-c", overwrite, path / "adapter_model.safetensors"])
loaded = 0
while writer.poll() is None:
    engine.adapters.handle(LoadAdapter("a", str(path), in_place=True))
    while not (replies := engine.adapters.take_replies()):
        engine.step()
    [reply] = replies
    loaded += reply.error is None
    assert reply.error is None or "written" in reply.error or "changed" in reply.error, reply
assert loaded and not writer.returncode, loaded
"""


def test_loads_beside_somebody_who_overwrites_the_file(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADS, tmp_path / "adapter"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
