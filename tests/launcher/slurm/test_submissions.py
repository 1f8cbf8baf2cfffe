"""The journal, the copy of the code, and what Slurm's commands say: as far as no Slurm is needed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgm_exp.search.outcome import Ending, Verdict, judge
from mgm_exp.slurm import JobState, Slurm, SlurmAway, Submission, Task, copy_presets, latest_of, snapshot
from mgm_exp.slurm.commands import read_accounts


def begun(sweep: Path, count: int = 2) -> Submission:
    tasks = [Task(sweep / str(number), (f"adapter.rank={number}",)) for number in range(count)]
    submission = Submission.begin(sweep, "a,b=c", tasks, is_array=count > 1, facts={"max_requeues": 3})
    submission.write("#!/bin/bash\n")
    return submission


def test_a_submission_is_found_by_its_runs_and_only_the_latest_counts(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.note_number("12")
    found = latest_of(tmp_path, tmp_path / "1")
    assert found is not None and found[0].job_of(found[1]) == "12_1"
    second = begun(tmp_path, 1)
    found = latest_of(tmp_path, tmp_path / "0")
    assert found is not None and (found[0].id, found[0].job) == (second.id, None)
    assert "," not in first.name, "squeue takes a list of names"
    assert latest_of(tmp_path, tmp_path / "7") is None


def test_a_submission_that_was_cut_off_is_known_by_its_job(tmp_path: Path) -> None:
    submission = begun(tmp_path)
    started = submission.folder / "started"
    started.mkdir()
    (started / "1.json").write_text(json.dumps({"job_id": "34_1"}))
    assert submission.find(Slurm()) == "34"
    again = Submission.read(submission.folder)
    assert again is not None and again.job == "34"


def test_who_looks_for_a_submission_waits_until_sbatch_has_ended_also_when_its_caller_is_dead(tmp_path: Path) -> None:
    submission = begun(tmp_path)
    with submission.sending() as descriptor:
        program = "import sys, time; sys.stdin.read(); open(sys.argv[1], 'w').close()"
        sbatch = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "done")], stdin=subprocess.PIPE, pass_fds=[descriptor]
        )
    assert sbatch.stdin is not None
    os.set_blocking(sbatch.stdin.fileno(), False)
    looking = subprocess.Popen(
        [sys.executable, "-c", f"""
import os, pathlib
from mgm_exp.slurm import Submission
with Submission.read(pathlib.Path({str(submission.folder)!r})).sending():
    print(os.path.exists({str(tmp_path / "done")!r}))
"""],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        looking.wait(1.0)
    sbatch.stdin.close()
    sbatch.wait()
    assert looking.communicate(timeout=30)[0].strip() == "True"


def test_the_copy_of_the_code_runs_and_has_its_origin(tmp_path: Path) -> None:
    code = snapshot(tmp_path / "code")
    assert snapshot(tmp_path / "code") == code, "the same code is copied once"
    assert [path.name for path in (tmp_path / "code").iterdir()] == [code.name]
    elsewhere = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{code}:{code / 'launcher'}", "PYTHONSAFEPATH": "1"}
    program = (
        "import mgm_exp, json\nfrom mgm_exp.compose import compose\nfrom mgm_exp.record import git_state\n"
        "from mgm_exp.bootstrap import ROOT\n"
        "print(json.dumps([mgm_exp.__file__, compose(['adapter.rank=3']).adapter.rank, git_state(ROOT)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file, rank, git = json.loads(done.stdout)
    assert Path(file).is_relative_to(code) and rank == 3
    assert git == json.loads((code / "source.json").read_text())["git"]


def test_presets_of_the_user_are_copied_too(tmp_path: Path) -> None:
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "long.yaml").write_text("epochs: 3\n")
    copy = copy_presets(tmp_path / "mine", tmp_path / "presets")
    (tmp_path / "mine" / "train" / "long.yaml").write_text("epochs: 4\n")
    assert (copy / "train" / "long.yaml").read_text() == "epochs: 3\n"
    assert copy_presets(tmp_path / "mine", tmp_path / "presets") != copy


def test_what_sacct_says_is_read() -> None:
    text = (
        "JobID|State|NodeList\n12_0|CANCELLED by 1000|n1\n12_[2-3%1]|PENDING|None assigned\n12_1|OUT_OF_MEMORY|n2\n"
        "13|COMPLETED|n1\n13.batch|FAILED|n1\n"
    )
    found = read_accounts(text)
    assert found["12_0"].state == "CANCELLED" and found["12_0"].is_over
    assert found["12_3"] == JobState("PENDING", "", "None assigned") and not found["12_3"].is_over
    assert (found["12_1"].state, found["13"].state) == ("OUT_OF_MEMORY", "COMPLETED")


def a_command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs with the names of Slurm's, which say what Slurm says in states that a test cannot bring about."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_jobs_that_the_controller_has_forgotten_are_looked_up_in_the_books(commands: Path) -> None:
    a_command(commands, "squeue", f"echo $@ >> {commands}/asked; echo '7_1|x|RUNNING|None|n1'")
    a_command(commands, "sacct", "printf 'JobID|State|NodeList\\n5|TIMEOUT|n1\\n'")
    slurm = Slurm()
    assert slurm.states(["7_1", "5", "6"]) == {
        "7_1": JobState("RUNNING", "None", "n1"), "5": JobState("TIMEOUT", "", "n1"),
    }  # fmt: skip
    assert "--jobs=5,6,7" in (commands / "asked").read_text()
    assert len((commands / "asked").read_text().splitlines()) == 1, "one question for all"
    a_command(commands, "sacct", f"echo x >> {commands}/sacct_asked; echo 'accounting storage is disabled' >&2; exit 1")
    assert slurm.states(["5"]) == {} and slurm.states(["5"]) == {}
    assert len((commands / "sacct_asked").read_text().splitlines()) == 1, (
        "where there are no books it is not asked again"
    )


@pytest.mark.parametrize(
    ("says", "is_away"),
    [("Unable to contact slurm controller (connect failure)", True), ("Invalid job id specified", False)],
)
def test_no_answer_is_not_the_same_as_no_job(commands: Path, says: str, is_away: bool) -> None:
    a_command(commands, "squeue", f"echo 'slurm_load_jobs error: {says}' >&2; exit 1")
    a_command(commands, "sacct", "exit 1")
    if is_away:
        with pytest.raises(SlurmAway):
            Slurm().states(["5"])
    else:
        assert Slurm().states(["5"]) == {}


def test_what_the_end_of_a_job_means() -> None:
    stale = {"status": "interrupted", "error": {"message": "of the stretch before"}}
    killed = judge(stale, (), Ending(-9, how="its process was killed by SIGKILL (job 1)"))
    assert (killed.verdict, killed.reason) == (Verdict.lost, "its process was killed by SIGKILL (job 1)")
    cancelled = judge({}, (), Ending(130, set_aside="its job was cancelled"))
    assert (cancelled.verdict, cancelled.reason) == (Verdict.interrupted, "its job was cancelled")
    memory = judge(stale, (), Ending(-9, out_of_memory=True, how="job 1"))
    assert memory.verdict is Verdict.infeasible and "job 1" in memory.reason
    done = {"status": "completed", "metrics": {}}
    assert judge(done, (), Ending(130, set_aside="its job was cancelled")).verdict is Verdict.completed
