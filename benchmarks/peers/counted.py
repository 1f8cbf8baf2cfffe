"""CPU seconds of a command and all its descendants, those too that nobody waited for: they are taken over here.

    python -m benchmarks.peers.counted SECONDS.txt COMMAND ...

Standard library only, so that nothing of this process weighs; it ends with its parent, and its descendants are told to
end with it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

_DEATH_SIGNAL, _SUBREAPER = 1, 36  # prctl(2)


def main(out: str, command: list[str]) -> int:
    """The exit code of the command."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
    libc.prctl(_SUBREAPER, 1)
    process = subprocess.Popen(command, env={**os.environ, "MGM_EXP_PARENT": str(os.getpid())})
    code = process.wait()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    Path(out).write_text(str(usage.ru_utime + usage.ru_stime), encoding="ascii")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
