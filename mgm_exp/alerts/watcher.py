"""The process beside a run that watches it and sends messages: ``python -m mgm_exp.alerts.watcher``.

It reads what happens as JSON lines. It is not the run's process, so it says also that a run hangs, and that it was
killed: then the lines end without a ``finish``, or its parent is another one. It ends soon after the run, whatever the
servers do that it sends to.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from mgm_exp.alerts.channels import Channels
from mgm_exp.alerts.watching import POLL_S, Watched, Watcher

# Seconds after the end of the run in which what waits may still be sent.
AFTER_S = 15.0
_LONGEST_LINE = 1 << 22


def main() -> int:
    """Reads from standard input until the run has ended."""
    source = sys.stdin.fileno()
    watcher: Watcher | None = None
    rest, is_over, next_look = b"", False, time.monotonic()
    while not is_over:
        poll_s = watcher.watched.poll_s if watcher else POLL_S
        ready, _, _ = select.select([source], [], [], max(0.0, min(poll_s, next_look - time.monotonic())))
        chunk = os.read(source, 1 << 16) if ready else None
        *lines, rest = (rest + (chunk or b"")).split(b"\n")
        for line in lines:
            call = json.loads(line)
            if watcher is None:
                watched = Watched(**call)
                watcher = Watcher(watched, Channels(watched.urls, _say))
            else:
                is_over = watcher.hear(call, time.time()) or is_over
        if is_over or watcher is None:
            if chunk == b"":
                return 0  # it ended before it began
            continue
        if chunk == b"" or (not ready and os.getppid() != watcher.watched.parent):
            watcher.died(time.time())
            break
        if time.monotonic() >= next_look:
            watcher.look(time.time())
            next_look = time.monotonic() + poll_s
        if len(rest) > _LONGEST_LINE:
            return 1
    assert watcher is not None
    watcher.channels.close(AFTER_S)
    return 0


def _say(sentence: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads that wait for a server are not waited for
