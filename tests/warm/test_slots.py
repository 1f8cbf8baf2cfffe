"""Workers that stay: one process for many runs, each of which finds what the first one found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError
from mgm_exp.search.outcome import Verdict, judge
from mgm_exp.slots import ChildProcesses
from mgm_exp.warm.settings import WarmConfig
from mgm_exp.warm.slots import settings_of, warm_slots

from .conftest import PROGRAM, Staff, collect, seen, work


def test_runs_share_a_process_and_find_nothing_of_the_one_before(tmp_path: Path, staff: Staff) -> None:
    works = [work(tmp_path, 0), work(tmp_path, 1, "mess"), work(tmp_path, 2, "raises"), work(tmp_path, 3)]
    ended = staff.do(*works)
    assert [ended[number].exit_code for number in range(4)] == [0, 0, 1, 0]
    first, *_, last = (seen(one) for one in works)
    assert last["pid"] == first["pid"] != os.getpid()
    same = ("OMP_NUM_THREADS", "LEFT_BEHIND", "descriptors", "folder", "handlers", "signal")
    assert {name: last[name] for name in same} == {name: first[name] for name in same}
    assert last["random"] != first["random"], "a new process's generator is seeded by the system"
    assert last["argv"][1:] == ["what=end", f"hydra.run.dir='{work(tmp_path, 3).run_dir}'", "hydra.mode=RUN"]
    assert int(last["first"]) >= 500, "the kernel takes a trial before the sweep"
    assert staff.said == []


def test_what_a_run_prints_is_shown_and_lies_in_its_own_file(
    tmp_path: Path, staff: Staff, capsys: pytest.CaptureFixture[str]
) -> None:
    staff.do(work(tmp_path, 0), work(tmp_path, 1, "refused"))
    shown = capsys.readouterr()
    assert shown.out == "run end prints\nrun refused prints\n"
    assert shown.err.count("UserWarning: said") == 2, "a warning is not kept back because another run had it"
    texts = [(tmp_path / str(number) / "output.txt").read_text(encoding="utf-8") for number in range(2)]
    assert "run end prints" in texts[0] and "refused" not in texts[0]
    assert "run refused prints" in texts[1] and "error: it was told to" in texts[1]


def test_a_crash_costs_its_worker_and_no_other_run(tmp_path: Path, staff: Staff) -> None:
    works = [work(tmp_path, 0, "killed"), work(tmp_path, 1, "gone"), work(tmp_path, 2, "exits"), work(tmp_path, 3)]
    ended = staff.do(*works)
    assert [ended[number].exit_code for number in range(4)] == [-signal.SIGKILL, 3, 7, 0]
    assert judge({}, (), ended[0]).verdict is Verdict.lost
    pids = [seen(one)["pid"] for one in works]
    assert len(set(pids)) == 3 and pids[2] == pids[3]


def test_a_worker_that_was_killed_while_it_waited_is_replaced(tmp_path: Path, staff: Staff) -> None:
    staff.do(work(tmp_path, 0))
    (pid,) = staff.slots.pids
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert staff.do(work(tmp_path, 1))[1].exit_code == 0
    assert staff.slots.pids != [pid]


def test_a_worker_that_holds_what_a_run_left_is_replaced_and_that_is_said(tmp_path: Path) -> None:
    staff = Staff(max_growth_gb=0.25)
    staff.do(work(tmp_path, 0), work(tmp_path, 1, "leak"), work(tmp_path, 2))
    pids = [seen(work(tmp_path, number))["pid"] for number in range(3)]
    staff.slots.close()
    assert pids[0] == pids[1] != pids[2]
    (said,) = staff.said
    assert "of host memory" in said and "max_growth_gb=0.25" in said


def test_a_little_freed_memory_stays_with_the_worker_and_much_does_not() -> None:
    script = """
from mgm_exp.evaluate.heap import keep_freed_memory
from mgm_exp.warm.worker import rest
keep_freed_memory()
began = rest()
blocks = [b"1" * (10 * 2**20) for _ in range(10)]
above = b"1" * 2**20
blocks.clear()
print(*(rest(began, limit).host_gib - began.host_gib for limit in (None, 0.3, 0.1)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    without_limit, little, much = map(float, done.stdout.split())
    assert min(without_limit, little) > 0.09 and much < 0.03


def test_slots_have_workers_of_their_own_and_one_above_its_memory_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    staff = Staff(2, mem_gb=0.3)
    staff.slots._places = [["4"], ["GPU-5"]]
    staff.slots.start(work(tmp_path, 0, "eat"))
    staff.slots.start(work(tmp_path, 1))
    assert staff.slots.busy == 2
    ended = collect(staff.slots, 2)
    staff.slots.close()
    verdict = judge({}, (), ended[0])
    assert (verdict.verdict, ended[1].exit_code) == (Verdict.infeasible, 0)
    assert "hydra.launcher.mem_gb=0.3" in verdict.reason
    rows = [seen(work(tmp_path, number)) for number in range(2)]
    assert [row["CUDA_VISIBLE_DEVICES"] for row in rows] == ["4", "GPU-5"]
    assert all("launch.machines=here" in row["argv"] and int(row["OMP_NUM_THREADS"]) >= 1 for row in rows)
    assert "run end prints" in (tmp_path / "1" / "output.txt").read_text(encoding="utf-8")


def test_a_stop_asks_the_runs_and_leaves_no_process(tmp_path: Path, staff: Staff) -> None:
    staff.slots.start(work(tmp_path, 0, "wait"))
    while not (tmp_path / "0" / "waiting").exists():
        assert staff.slots.ended(0.02) == []
    (pid,) = staff.slots.pids
    assert [(done.number, ending.exit_code) for done, ending in staff.slots.stop()] == [(0, 130)]
    assert staff.slots.busy == 0 and not Path(f"/proc/{pid}").exists()


def test_one_order_may_hold_several_runs(tmp_path: Path, staff: Staff) -> None:
    works = [work(tmp_path, 0), work(tmp_path, 1, "refused"), work(tmp_path, 2, "gone"), work(tmp_path, 3)]
    staff.slots.start_all(works)
    assert staff.slots.busy == 1
    ended = collect(staff.slots, 4)
    assert [ended[number].exit_code for number in range(4)] == [0, 2, 3, 3]


def test_workers_end_with_the_sweep(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from mgm_exp.slots import Work
from mgm_exp.warm.slots import WarmSlots
slots = WarmSlots([[]], [sys.executable, {str(PROGRAM)!r}])
slots.start(Work(0, Path({str(tmp_path / "0")!r}), ("what=wait",)))
while True:
    slots.ended(1.0)
"""
    root = PROGRAM.parents[2]
    sweep = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(root)}, cwd=root)
    deadline = time.monotonic() + 120
    while not (tmp_path / "0" / "waiting").exists():
        assert time.monotonic() < deadline and sweep.poll() is None
        time.sleep(0.02)
    pid = seen(work(tmp_path, 0))["pid"]
    sweep.kill()
    sweep.wait()
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the worker goes on without its sweep"
        time.sleep(0.02)


def test_how_many_workers_there_are(compose: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert warm_slots(WarmConfig(), compose("devices=2"), ["x"]).size == 2
    assert warm_slots(WarmConfig(), compose("sweep.slots=3"), ["x"]).size == 3
    assert warm_slots(WarmConfig(), compose("device=cpu"), ["x"]).size == 1
    assert warm_slots(WarmConfig(), compose("launch.hostfile=hosts"), ["x"]).size == 1
    isolated = warm_slots(WarmConfig(slots=2), compose("sweep.isolate=true"), ["x"])
    assert isinstance(isolated, ChildProcesses) and isolated.size == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert warm_slots(WarmConfig(), compose("devices=2"), ["x"]).size == 1, "the other GPU is another machine's"
    with pytest.raises(ConfigError, match=r"launch\.wait=false"):
        warm_slots(WarmConfig(), compose("launch.wait=false"), ["x"])
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.max_growth_gb=-1"):
        settings_of({"max_growth_gb": -1})


def test_a_worker_whose_gpu_broke_down_is_replaced(staff: Staff, tmp_path: Path) -> None:
    """As after a failed assertion in a kernel, when no call succeeds any more in that process."""
    works = [work(tmp_path, 0, "breaks"), work(tmp_path, 1)]
    ended = staff.do(*works)
    assert [ended[number].exit_code for number in (0, 1)] == [1, 0]
    pids = [seen(one)["pid"] for one in works]
    assert pids[0] != pids[1]
