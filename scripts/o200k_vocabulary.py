"""Put o200k_base.tiktoken, gpt-oss's vocabulary, into a directory: o200k_vocabulary.py DIR

The file ships inside the litellm wheel, under the name by which tiktoken caches it. Tests use it as
TIKTOKEN_ENCODINGS_BASE; a checkpoint without tokenizer.json can be served with it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "litellm==1.109.1"
CACHED_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def main(folder: Path) -> None:
    """Download the wheel, take the one file out, check it."""
    target = folder / "o200k_base.tiktoken"
    if target.is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", scratch, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            [name] = [n for n in wheel.namelist() if n.endswith(CACHED_NAME)]
            data = wheel.read(name)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        sys.exit(f"{WHEEL} holds another vocabulary: sha256 {found}, expected {SHA256}")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
