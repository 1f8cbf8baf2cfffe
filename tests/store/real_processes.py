"""Python processes of their own that import the store, say what they do, and can be killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# A process on another machine of a cluster whose file system keeps locks to each machine, or has none.
ELSEWHERE = """
import errno
from mgm_exp.store import claims, processes
processes.socket.gethostname = lambda: "node-{name}"
def flock(descriptor, kind):
    raise OSError(errno.ENOLCK, "No locks available")
claims.fcntl.flock = flock
"""


class Child:
    """``python -c code`` with the store importable; talks line by line."""

    def __init__(self, code: str, *arguments: object, elsewhere: str = "") -> None:
        begin = ELSEWHERE.format(name=elsewhere) if elsewhere else ""
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-B", "-u", "-c", begin + code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        self.said = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self, word: str, limit_s: float = 60.0) -> str:
        """Reads until a line that begins with ``word``, and returns it."""
        assert self.process.stdout is not None
        end = time.monotonic() + limit_s
        while True:
            *lines, rest = self.said.split(b"\n")
            for index, line in enumerate(lines):
                if line.decode().startswith(word):
                    self.said = b"\n".join([*lines[index + 1 :], rest])
                    return line.decode()
            left = end - time.monotonic()
            assert left > 0, f"no {word!r} within {limit_s} s; it said: {self.said.decode()}"
            if select.select([self.process.stdout], [], [], left)[0]:
                more = os.read(self.process.stdout.fileno(), 65536)
                assert more, f"ended without saying {word!r}; it said: {self.said.decode()}"
                self.said += more

    def tell(self, word: str = "go") -> None:
        """Writes a line to its standard input; it need not read it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(word.encode() + b"\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP, and waits until it is in force."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def finish(self, limit_s: float = 60.0) -> str:
        """Waits for its good end and returns what it still said."""
        output, _ = self.process.communicate(timeout=limit_s)
        text = (self.said + output).decode()
        assert self.process.returncode == 0, text
        return text

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):  # not read to the end: a grandchild may hold it open
            if pipe is not None:
                pipe.close()
