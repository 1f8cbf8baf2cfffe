"""A process is told from its namesakes, and a child dies with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from mgm_exp.store import Process, processes

from .crash_points import wait_until
from .real_processes import Child

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl and /proc are Linux")


def test_this_process_is_here_and_alive_and_survives_json() -> None:
    me = Process.current()
    assert Process.from_json(me.to_json()) == me
    assert me.is_on_this_machine() and me.is_visible() and me.is_alive() and not me.is_stopped()
    assert not replace(me, boot_id="another boot").is_on_this_machine()
    assert not replace(me, host="another host").is_visible()


def test_a_name_never_holds_command_line_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/somebody/mgm_exp/__main__.py", "tracker.key=SECRET"])
    assert Process.current().command == "mgm_exp/__main__.py"


def test_a_dead_process_a_zombie_and_a_namesake_are_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    started = processes.start_time(child.pid)
    assert started is not None
    assert not replace(Process.current(), pid=child.pid, started=started + 1).is_alive(), "the pid was used again"
    child.kill()
    wait_until(lambda: processes.start_time(child.pid) is None)  # a zombie: nobody has waited for it yet
    child.communicate()
    assert processes.start_time(child.pid) is None


def test_only_the_process_that_was_meant_is_killed() -> None:
    with Child("print('here'); input()") as child:
        child.hear("here")
        started = processes.start_time(child.pid)
        assert started is not None
        assert not processes.kill(child.pid, started - 1)
        assert child.process.poll() is None
        assert processes.kill(child.pid, started)
        assert child.process.wait(20) == -signal.SIGKILL
        assert not processes.kill(child.pid, started)


@LINUX
def test_ancestors_are_known() -> None:
    assert processes.is_descendant_of(os.getpid()) is True
    assert processes.is_descendant_of(os.getppid()) is True
    with Child("print('here'); input()") as child:
        assert processes.is_descendant_of(child.pid) is False


@LINUX
def test_a_child_dies_with_its_killed_parent() -> None:
    grandchild = "import os, sys\nfrom mgm_exp.store import die_with_parent\n"
    grandchild += "print(die_with_parent(parent_pid=int(sys.argv[1])), os.getpid(), flush=True)\ninput()"
    parent = "import os, subprocess, sys\n"
    parent += f"child = subprocess.Popen([sys.executable, '-S', '-c', {grandchild!r}, str(os.getpid())], stdin=-1)\n"
    parent += "child.wait()"
    with Child(parent) as child:
        armed, pid = child.hear("None").split()
        assert armed == "None", "in force"
        child.kill()
        wait_until(lambda: processes.start_time(int(pid)) is None)


@LINUX
def test_a_child_whose_parent_died_before_it_asked_dies_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    code = (
        "import sys\nfrom mgm_exp.store import die_with_parent\ndie_with_parent(parent_pid=int(sys.argv[1]))\ninput()"
    )
    with Child(code, gone.pid) as child:
        assert child.process.wait(30) == -signal.SIGKILL


def test_where_there_is_no_such_signal_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    assert processes.die_with_parent() == "darwin has no parent-death signal"
