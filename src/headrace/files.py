"""Files: the bundled model, and those that the caller names."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.config import ConfigError

# Of an adapter's name. No control characters: paths have names in them, and lines of the log.
NAME_CHARACTER, MAX_NAME = r"[^\x00-\x1f\x7f]", 256
BUNDLED_MODEL = Path(__file__).parent / "data" / "tiny"


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON object; ConfigError if the file is missing (unless missing_ok) or something else."""
    is_file = os.path.isfile(path)  # Path.is_file raises for names that are too long
    if missing_ok and not is_file:
        return {}
    if not is_file and os.path.exists(path):
        raise ConfigError(f"cannot read {path}: it is not a file")  # a pipe would be waited for
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def read_ahead(checkpoint: Path) -> None:
    """Have the system read a checkpoint's files meanwhile, if they take less than half the memory.

    A process that is about to import torch for seconds so loses no time of a slow disk.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # whoever reads the files will say what is wrong with them
        files = sorted(checkpoint.glob("*.safetensors"))
        if sum(file.stat().st_size for file in files) > memory / 2:
            return
        for file in files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def directory(path: str) -> Path:
    """The path with ~ replaced, if it names a user that there is."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises for users that there aren't


def parse_module(text: str) -> tuple[str, Path]:
    """NAME=DIRECTORY, or the JSON object {"name": ..., "path": ...} that vLLM takes too.

    Its base_model_name, in vLLM the parent to list, is ignored: that is the served model.
    """
    if text.lstrip().startswith("{"):
        try:
            module = json.loads(text)
        except ValueError:
            module = {}
        name, path = module.get("name"), module.get("path")
        if unknown := sorted(module.keys() - {"name", "path", "base_model_name"}):
            raise ConfigError(f"--lora-modules {text}: {unknown[0]!r} is not a known field")
    else:
        name, _, path = text.partition("=")
    if not (isinstance(name, str) and isinstance(path, str) and name and path):
        json_form = '{"name": NAME, "path": DIRECTORY}'
        raise ConfigError(f"--lora-modules {text}: it must be NAME=DIRECTORY or {json_form}")
    is_unicode = not re.search(r"[\ud800-\udfff]", name)
    if not (is_unicode and re.fullmatch(f"{NAME_CHARACTER}{{1,{MAX_NAME}}}", name)):
        rule = f"1 to {MAX_NAME} characters of valid Unicode, none of them a control character"
        raise ConfigError(f"--lora-modules {text!r}: the name must be {rule}")
    return name, directory(path)
