"""Signals are remembered for the end of the step; a second one does not wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mgm_exp.errors import EXIT_INTERRUPTED
from mgm_exp.train.stop import StopRequest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_remembered_and_the_handler_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert not stop.is_requested()
        os.kill(os.getpid(), number)
        assert stop.is_requested()
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal\n"
        "from mgm_exp.train.stop import StopRequest\n"
        "with StopRequest().listening():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('second', flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "first\n"
    assert ended.returncode == EXIT_INTERRUPTED


def test_a_callback_and_a_file_ask_too(tmp_path: Path) -> None:
    answers = [False, True]
    stop = StopRequest(lambda: answers.pop(0))
    assert [stop.is_requested() for _ in range(3)] == [False, True, True]
    by_file = StopRequest(file=tmp_path / "stop")
    assert not by_file.is_requested()
    (tmp_path / "stop").write_text("SIGTERM")
    assert by_file.is_requested()
    assert by_file.reason == "SIGTERM"


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def listen() -> None:
        with StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
