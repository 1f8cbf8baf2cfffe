"""Runs a program that ends with the process that started it: ``python -m mgm_exp.train.attached PARENT PROGRAM ...``.

The kernel's promise (``die_with_parent``) survives ``exec``, so that it also holds for programs that know nothing of
it: srun, ssh. They get SIGTERM, which both pass on by ending what they started.
"""

from __future__ import annotations

import os
import signal
import sys

from mgm_exp.store import die_with_parent


def attached(program: list[str]) -> list[str]:
    """The command line that runs ``program`` as long as this process lives. Start it from the main thread."""
    return [sys.executable, "-m", "mgm_exp.train.attached", str(os.getpid()), *program]


if __name__ == "__main__":
    die_with_parent(signal.SIGTERM, parent_pid=int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
