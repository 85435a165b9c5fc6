"""The adapters that CPU memory holds, from where the device can fetch them without their files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Generic

from headrace.lora.adapter import Adapter
from headrace.lora.load import Lora, R, error_text
from headrace.lora.loader import Loader

log = logging.getLogger(__name__)


class CpuTier(Generic[R]):
    """At most max_loras, the longest unused go. What is copied to the device just now stays."""

    def __init__(self, loader: Loader, max_loras: int) -> None:
        self._loader = loader
        self._max_loras = max_loras
        self._held: list[Lora[R]] = []
        self._keeps: dict[Lora[R], Future[Adapter]] = {}

    def __contains__(self, lora: Lora[R]) -> bool:
        """Whether it is here or on its way."""
        return lora in self._held or lora in self._keeps

    @property
    def has_room(self) -> bool:
        """Whether one more may come and none would go."""
        return len(self._held) + len(self._keeps) < self._max_loras

    @property
    def futures(self) -> list[Future[Adapter]]:
        """Of those that are on their way."""
        return list(self._keeps.values())

    def is_keeping(self, lora: Lora[R]) -> bool:
        """Whether it is on its way."""
        return lora in self._keeps

    def keep(self, lora: Lora[R], adapter: Adapter) -> None:
        """Begin to copy what is only mapped from the file, beside all other work."""
        lora.adapter = adapter
        self._keeps[lora] = self._loader.keep(adapter)

    def take_kept(self) -> Iterator[Lora[R]]:
        """Those whose way ended, with the copy as their adapter, or None where that failed."""
        for lora in [x for x, f in self._keeps.items() if f.done()]:
            kept: Adapter | None = None
            try:
                kept = self._keeps.pop(lora).result()
            except Exception as error:
                log.warning("adapter %s stays on disk: %s", lora.name, error_text(error))
                if lora.is_copying:
                    continue  # from what would be let go now; with its end that is kept after all
            self.let_go(lora)
            lora.adapter = kept
            yield lora

    def hold(self, lora: Lora[R]) -> None:
        """Count a copy that was kept; the longest unused make room for it."""
        self._held.append(lora)
        spare = [x for x in self._held if x is not lora and not x.is_copying]
        spare.sort(key=lambda x: x.last_used)
        for other in spare[: max(0, len(self._held) - self._max_loras)]:
            self.let_go(other)

    def let_go(self, lora: Lora[R]) -> None:
        """Forget what CPU memory holds of an adapter; the device and the disk have it still."""
        if lora in self._held:
            self._held.remove(lora)
        if lora.adapter is not None:
            self._loader.drop(lora.adapter)
        lora.adapter = None
