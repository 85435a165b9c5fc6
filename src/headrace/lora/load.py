"""One load of an adapter: what is known of it, and where it is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from headrace.config import ConfigError
from headrace.lora.adapter import Adapter
from headrace.lora.loader import Stamp
from headrace.lora.memory import Placement, Sizes

R = TypeVar("R")  # a request; the pool only keeps and returns them


@dataclass(eq=False)
class Lora(Generic[R]):
    """One load of an adapter. uid never returns, so that it may salt hashes of the prefix cache."""

    uid: int
    name: str
    path: Path
    sizes: Sizes = field(repr=False)
    stamp: Stamp  # of the file when it was read
    adapter: Adapter | None = field(repr=False)  # in CPU memory, if it is there now
    slot: int | None = None  # set while it has a place on the device
    placement: Placement | None = None
    ready: bool = False  # its slot can be used
    closed: bool = False  # it takes no new requests, and leaves when the last one is done
    retired: bool = False  # unloaded, or replaced by a later load
    checked: bool = False  # the self-check has passed
    holders: int = 0  # requests that the scheduler has
    parked: deque[R] = field(default_factory=deque, repr=False)
    last_used: int = 0

    @property
    def size(self) -> int:
        """Elements in device memory."""
        return sum(self.sizes.values())

    @property
    def is_copying(self) -> bool:
        """Whether it is on its way to the device."""
        return self.slot is not None and not self.ready

    @property
    def is_idle(self) -> bool:
        """Whether it may leave the device now."""
        return self.ready and not self.holders


def error_text(error: Exception) -> str:
    """Why a load failed, for those who wait for it.

    An unexpected error has its type's name before its text, which may be empty.
    """
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    # a file's name may be no UTF-8, which no message can be encoded with
    return text.encode("utf-8", "backslashreplace").decode()
