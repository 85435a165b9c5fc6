"""Keeping others from a file while it is mapped: Linux's leases, F_SETLEASE of fcntl(2).

To read a page that the mapped file has no longer ends the process (SIGBUS).
"""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

from headrace.config import ConfigError


class Lease:
    """Until its end, those who would write to a file or cut it short wait, 45 s at most.

    That is /proc/sys/fs/lease-break-time. Where there are no leases (somebody else's file, some
    network file systems) nobody waits. Raises ConfigError if the file is being written now.
    """

    def __init__(self, path: Path) -> None:
        self._file: int | None = None  # for __del__, should open fail
        self._file = os.open(path, os.O_RDONLY)
        try:
            # who waits is told by a signal: one that nobody minds, for the usual one ends a process
            fcntl.fcntl(self._file, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            self.end()
            raise ConfigError(f"{path} is being written; load it when that is done") from None
        except OSError:
            pass

    def end(self) -> None:
        """Let the others go on. A second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        self.end()
