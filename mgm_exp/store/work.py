"""The folder in which a stage is made: it survives its maker, and so does the count of the time spent in it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

from mgm_exp.errors import DiskFullError

from .files import read_json, temporary_name, write_json_atomic
from .layout import beside, work_number
from .lease import Lease
from .sealed import remove_folder

_log = logging.getLogger(__name__)

ATTEMPTS = "attempts.json"


def adopt_work(final: Path, lease: Lease) -> Path:
    """The work folder, new or of an earlier attempt.

    An earlier owner that is known to be dead left it as it is. One that was only not heard of (on another machine) may
    wake up and go on writing: its folder gets a new name, so that its paths lead nowhere, and its files new bytes on
    disk, so that what it has open is no longer part of it.
    """
    plain = beside(final, "work")
    # By name, not by looking through all entries: who fences a folder off gives it his token, and tokens grow.
    fenced_names = [f"{plain.name}-{number:06x}" for number in range(1, lease.token + 1)]
    found = [path for path in (plain, *map(final.with_name, fenced_names)) if path.is_dir()]
    work = max(found, key=work_number, default=plain)
    for older in found:
        if older != work:
            remove_folder(older)
    if lease.took_over_expired and work.is_dir():
        number = lease.token
        while (fenced := beside(final, f"work-{number:06x}")).exists():  # of a time before the lease was forgotten
            number += 1
        os.rename(work, fenced)
        work = fenced
        for parent, _, names in os.walk(work):
            for name in names:
                path, temporary = Path(parent, name), Path(parent, temporary_name())
                shutil.copy2(path, temporary, follow_symlinks=False)
                os.replace(temporary, path)
    work.mkdir(parents=True, exist_ok=True)
    return work


class Clock:
    """Time spent in ``make`` over all attempts, also those that were killed: saved with each heartbeat."""

    def __init__(self) -> None:
        self.seconds, self.attempts = 0.0, 0
        self._before, self._started = 0.0, 0.0
        self._file: Path | None = None

    def start(self, file: Path) -> None:
        """Begins an attempt; ``file`` holds what earlier ones took."""
        try:
            saved = read_json(file)
            self._before, self.attempts = float(saved["seconds"]), int(saved["attempts"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._before, self.attempts = 0.0, 0
        self.attempts += 1
        self._started, self._file = time.monotonic(), file
        self.save()

    def save(self) -> None:
        """Writes down the time until now."""
        if self._file is None:
            return
        self.seconds = self._before + time.monotonic() - self._started
        try:
            write_json_atomic(self._file, {"seconds": self.seconds, "attempts": self.attempts})
        except (OSError, DiskFullError) as error:  # a record of time is no reason to stop the work it measures
            _log.warning("%s", error)

    def stop(self) -> None:
        """Ends the attempt."""
        self.save()
        self._file = None
