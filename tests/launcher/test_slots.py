"""Places for trials: each child has its threads and GPUs, dies with its parent, and says how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgm_exp.search.outcome import Verdict, judge
from mgm_exp.slots import ChildProcesses, InProcess, Work, own_program

CHILD = """
import json, os, sys, time
run_dir = next(item.split("=", 1)[1].strip("'") for item in sys.argv if item.startswith("hydra.run.dir="))
what = next(item.split("=", 1)[1] for item in sys.argv if item.startswith("what="))
names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MGM_EXP_PARENT")
with open(run_dir + "/seen.json", "w") as file:
    score = open("/proc/self/oom_score_adj").read()
    json.dump({"argv": sys.argv[1:], "oom_score_adj": score, **{name: os.environ.get(name) for name in names}}, file)
print("hello", flush=True)
if what == "fail":
    print("error: it was told to")
    sys.exit(1)
if what == "eat":
    import subprocess
    helper = "import time; held = bytearray(300 * 2**20); held[::4096] = b'1' * len(held[::4096]); time.sleep(60)"
    subprocess.run([sys.executable, "-c", helper])
if what == "wait":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    open(run_dir + "/waiting", "w").close()
    time.sleep(60)
"""


def slots(tmp_path: Path, *places: list[str], mem_gb: float | None = None) -> ChildProcesses:
    program = tmp_path / "child.py"
    program.write_text(CHILD, encoding="utf-8")
    return ChildProcesses(places, [sys.executable, str(program)], mem_gb)


def work(tmp_path: Path, number: int, what: str = "end") -> Work:
    return Work(number, tmp_path / "it is here" / str(number), (f"what={what}", f"trial={number}"))


def collect(found: ChildProcesses, count: int) -> dict[int, object]:
    ended: dict[int, object] = {}
    deadline = time.monotonic() + 300
    while len(ended) < count:
        assert time.monotonic() < deadline
        ended |= {done.number: ending for done, ending in found.ended(1.0)}
    return ended


def test_each_child_has_its_share_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = slots(tmp_path, ["4", "5"], ["GPU-6", "GPU-7"])
    for number in range(2):
        found.start(work(tmp_path, number))
    assert found.busy == 2
    ended = collect(found, 2)
    assert [ending.exit_code for ending in ended.values()] == [0, 0]  # type: ignore[attr-defined]
    seen = [json.loads((work(tmp_path, number).run_dir / "seen.json").read_text()) for number in range(2)]
    assert [row["CUDA_VISIBLE_DEVICES"] for row in seen] == ["4,5", "GPU-6,GPU-7"]
    assert all("launch.machines=here" in row["argv"] for row in seen)
    assert all(int(row["oom_score_adj"]) >= 500 for row in seen), "the kernel takes a trial before the sweep"
    assert all(int(row["OMP_NUM_THREADS"]) >= 1 and row["MGM_EXP_PARENT"] == str(os.getpid()) for row in seen)
    assert all("hydra.mode=RUN" in row["argv"] for row in seen)
    assert (work(tmp_path, 0).run_dir / "output.txt").read_text() == "hello\n"
    assert found.busy == 0


def test_how_a_child_ended_is_said(tmp_path: Path) -> None:
    found = slots(tmp_path, [])
    found.start(work(tmp_path, 0, "fail"))
    (ending,) = collect(found, 1).values()
    assert (ending.exit_code, ending.output) == (1, "it was told to")  # type: ignore[attr-defined]


def test_a_stop_asks_all_and_waits(tmp_path: Path) -> None:
    found = slots(tmp_path, [], [])
    for number in range(2):
        found.start(work(tmp_path, number, "wait"))
    deadline = time.monotonic() + 300
    while not all((work(tmp_path, number).run_dir / "waiting").exists() for number in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sorted(ending.exit_code or 0 for _, ending in found.stop()) == [130, 130]
    assert found.busy == 0


def test_a_child_above_its_memory_is_ended_with_what_it_started_and_harms_no_other(tmp_path: Path) -> None:
    found = slots(tmp_path, [], [], mem_gb=0.25)
    found.start(work(tmp_path, 0, "eat"))
    found.start(work(tmp_path, 1))
    ended = collect(found, 2)
    verdict = judge({}, (), ended[0])  # type: ignore[arg-type]
    assert (verdict.verdict, ended[1].exit_code) == (Verdict.infeasible, 0)  # type: ignore[attr-defined]
    assert "hydra.launcher.mem_gb=0.25" in verdict.reason


def test_any_folder_survives_the_way_to_a_child() -> None:
    from mgm_exp.compose import parse
    from mgm_exp.search.space import as_text

    for folder in ("it's here", "a,b=[c]", "${x}", "back\\slash", "ü"):
        (override,) = parse([f"hydra.run.dir={as_text(folder)}"])
        assert override.value() == folder


def test_the_program_of_a_child_is_this_package() -> None:
    assert own_program("presets") == [sys.executable, "-m", "mgm_exp", "--config-dir", "presets"]
    done = subprocess.run([*own_program(), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0


def test_in_this_process_an_error_without_a_record_gets_one(tmp_path: Path) -> None:
    recorded = []

    class Returned:
        """As Hydra's launcher gives it back."""

        status = "failed"
        _return_value = ValueError("broken")

    def launch(overrides: list[str], number: int) -> Returned:
        assert (overrides, number) == (["what=end", "trial=3"], 3)
        return Returned()

    found = InProcess(launch, lambda *args: recorded.append(args))  # type: ignore[arg-type]
    found.start(work(tmp_path, 3))
    assert [type(error) for _, error, _ in recorded] == [ValueError]
    assert [done.number for done, _ in found.ended(0)] == [3] and found.busy == 0
