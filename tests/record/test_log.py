"""``log.txt``: what was printed, as a reader would see it."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import cast

import pytest

from mgm_exp.record import log_to
from mgm_exp.record.log import LogFile, Tee, plain_line


class Terminal(io.StringIO):
    """A terminal that remembers what it was sent."""

    def isatty(self) -> bool:
        return True


@contextmanager
def printing_to(terminal: Terminal, folder: Path) -> Iterator[None]:
    """Standard output is a terminal, and logged."""
    with redirect_stdout(terminal), log_to(folder):
        yield


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def logged(folder: Path) -> list[str]:
    """The lines after the one that says when and how the run was started."""
    first, *rest = (folder / "log.txt").read_text().splitlines()
    assert first.startswith("--- 20")
    return rest


def test_the_screen_gets_what_it_got_and_the_log_gets_the_lines(tmp_path: Path, terminal: Terminal) -> None:
    with printing_to(terminal, tmp_path):
        print("one", end=" ")
        print("two")
        print("\x1b[31mred\x1b[0m \x1b]8;;file:///x\x07link\x1b]8;;\x07")
        print("no line end", end="")
    assert terminal.getvalue() == "one two\n\x1b[31mred\x1b[0m \x1b]8;;file:///x\x07link\x1b]8;;\x07\nno line end"
    assert logged(tmp_path) == ["one two", "red link", "no line end"]


def test_a_moving_bar_leaves_one_line(tmp_path: Path, terminal: Terminal) -> None:
    with printing_to(terminal, tmp_path):
        for step in range(1, 101):
            sys.stdout.write(f"\r{step}%|{'#' * step}|")
        sys.stdout.write("\n")
        print("after")
    assert logged(tmp_path) == ["100%|" + "#" * 100 + "|", "after"]


def test_every_line_is_written_when_it_ends(tmp_path: Path, terminal: Terminal) -> None:
    with printing_to(terminal, tmp_path):
        print("now")
        assert logged(tmp_path) == ["now"]


def test_stderr_and_logging_are_in_it_also_through_handlers_from_before(tmp_path: Path) -> None:
    screen = Terminal()
    early = logging.StreamHandler(screen)
    logger = logging.getLogger("test_log")
    logger.addHandler(early)
    try:
        with redirect_stderr(screen), log_to(tmp_path):
            logger.warning("from a handler that was there before")
            print("to stderr", file=sys.stderr)
        assert early.stream is screen
    finally:
        logger.removeHandler(early)
    assert logged(tmp_path) == ["from a handler that was there before", "to stderr"]
    assert screen.getvalue() == "from a handler that was there before\nto stderr\n"


def test_a_handler_that_looks_stderr_up_itself_is_left_alone(tmp_path: Path) -> None:
    """Some libraries register logging's last resort, whose stream is a property without a setter."""
    logger = logging.getLogger("a library")
    assert logging.lastResort is not None
    logger.addHandler(logging.lastResort)
    try:
        with log_to(tmp_path):
            logger.warning("said by the last resort")
        assert "said by the last resort" in (tmp_path / "log.txt").read_text()
    finally:
        logger.removeHandler(logging.lastResort)


def test_a_second_start_continues_the_log(tmp_path: Path, terminal: Terminal) -> None:
    for word in ("first", "second"):
        with printing_to(terminal, tmp_path):
            print(word)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["first", "second"]


def test_secrets_are_masked_in_the_log(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-6612aa")
    with printing_to(terminal, tmp_path):
        print("the key is canary-6612aa")
    assert logged(tmp_path) == ["the key is ***"]


def test_lines_of_threads_do_not_mix(tmp_path: Path, terminal: Terminal) -> None:
    def speak(name: str) -> None:
        for _ in range(200):
            print(name * 40)

    with printing_to(terminal, tmp_path):
        threads = [threading.Thread(target=speak, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(logged(tmp_path)) == {"a" * 40, "b" * 40, "c" * 40}
    assert len(logged(tmp_path)) == 600


def test_forked_workers_write_into_the_same_log(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mgm_exp.record import log_to\n"
        "with log_to(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    print('child' if child == 0 else 'parent')\n"
        "    sys.stdout.flush()\n"
        "    os._exit(0) if child == 0 else os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "child" in done.stdout and "parent" in done.stdout
    assert sorted(logged(tmp_path)) == ["child", "parent"]


def test_a_bar_on_the_screen_takes_the_lines_in_the_terminals_place(tmp_path: Path) -> None:
    screen, above = io.StringIO(), []
    book = LogFile(tmp_path / "log.txt")
    tee = Tee(screen, book)
    tee.above = above.append
    print("while it moves", file=tee)
    tee.above = None
    print("when it is gone", file=tee)
    book.close()
    assert above == ["while it moves"]
    assert screen.getvalue() == "when it is gone\n"
    assert (tmp_path / "log.txt").read_text() == "while it moves\nwhen it is gone\n"


def test_a_log_that_cannot_be_written_is_given_up_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    book = LogFile(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        book.line("one")
        book.line("two")
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "log.txt cannot be written any more"
    ]


def test_children_get_the_terminal_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open(os.dup(1), "w") as screen:
        tee = Tee(screen, LogFile(tmp_path / "log.txt"))
        subprocess.run([sys.executable, "-c", "print('from a child')"], stdout=cast(io.TextIOBase, tee), check=True)
    assert capfd.readouterr().out == "from a child\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a\rb", "b"),
        ("text\r", "text"),
        ("\x1b[2K\x1b[1A done", " done"),
        ("\x1b[38;5;12mblue\x1b[0m", "blue"),
        ("", ""),
    ],
)
def test_a_line_as_a_reader_sees_it(line: str, expected: str) -> None:
    assert plain_line(line) == expected


def test_a_run_outlives_its_terminal_and_its_log_is_complete(tmp_path: Path) -> None:
    class Closed(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    with printing_to(Closed(), tmp_path):
        print("step 1", flush=True)
        print("step 2", flush=True)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("step")] == ["step 1", "step 2"]
    assert sum("terminal went away" in line for line in lines) == 1
