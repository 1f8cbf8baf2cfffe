"""The trials of a sweep as Slurm jobs: an array for a grid, a job for each trial of a search.

Whoever started a job need not live to see its end. What was submitted stands in the journal beside the trials
(:mod:`mgm_exp.slurm.submissions`); the same command finds it there and goes on with the jobs that still live. A job
that says of itself that it has ended is not asked for; all others are asked for in one question, ever more rarely while
nothing happens. A controller that does not answer is waited for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.errors import UserError
from mgm_exp.search.outcome import Ending
from mgm_exp.search.reports import sweep_folder
from mgm_exp.slots import Slots, Work, last_words
from mgm_exp.slurm import (
    FOLDER,
    ContainerRuntime,
    JobState,
    Slurm,
    SlurmAway,
    SlurmConfig,
    Submission,
    Task,
    copy_presets,
    latest_of,
    render_script,
    snapshot,
)

# Tasks of one array: clusters take indices up to 1000 (MaxArraySize) unless they were told otherwise.
LARGEST_ARRAY = 1000
# Between two questions to Slurm: from the first to the second, growing while nothing happens.
ASK_S = (1.0, 30.0)
# Between two looks at what the jobs say of themselves.
LOOK_S = (0.1, 1.0)
# How long after its end a job may still say how it ended: files of another machine take a while to be seen.
SETTLE_S = 3.0
# How long a job may be unknown to Slurm before it counts as lost.
UNKNOWN_S = 6.0
_EXIT_INTERRUPTED, _EXIT_USER_ERROR = 130, 2


@dataclass
class _Active:
    """A run that is a job, or has been one and was not collected yet."""

    work: Work
    submission: Submission
    index: int
    state: JobState | None = None
    unknown_since: float | None = None
    over_since: float | None = None
    is_held: bool = False

    @property
    def job(self) -> str:
        return self.submission.job_of(self.index)

    @property
    def place(self) -> str:
        return f"job {self.job}; log: {self.submission.log_of(self.index)}"


class SlurmSlots(Slots):
    """See the module.

    Args:
        settings: ``hydra.launcher``.
        program: The command line that runs one experiment, without its overrides.
        size: Runs at the same time; for a grid as many as there may be, Slurm shares out the places.
        is_grid: Whether what is started together becomes one array.
        waits: ``launch.wait``.
        say: Prints a line.
    """

    are_here = False

    def __init__(
        self,
        settings: SlurmConfig,
        program: Sequence[str],
        size: int,
        *,
        is_grid: bool,
        waits: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.settings, self._program, self.size = settings, list(program), size
        self._is_grid, self._waits, self._say = is_grid, waits, say
        self._slurm = Slurm()
        self._new: list[Work] = []
        self._unsent: list[tuple[Submission, list[Work]]] = []
        self._active: list[_Active] = []
        self._code: Path | None = None
        self._is_away = False
        self._ask_every, self._look_every = ASK_S[0], LOOK_S[0]
        self._ask_at = 0.0

    @property
    def busy(self) -> int:
        return len(self._new) + sum(len(works) for _, works in self._unsent) + len(self._active)

    def start(self, work: Work) -> None:
        """Takes a run; it is submitted, with the others of this moment, when :meth:`ended` is called next."""
        self._new.append(work)

    def has_begun(self, number: int) -> bool:
        return any(
            active.work.number == number and active.state is not None and active.state.state == "RUNNING"
            for active in self._active
        )

    def may_leave(self) -> bool:
        return not self._waits and not self._new and not self._unsent

    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        deadline = time.monotonic() + timeout_s
        while True:
            if time.monotonic() >= self._ask_at or not self._is_away:
                self._when_slurm_answers(self._send)
            found = self._look()
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(left, self._look_every))
            self._look_every = min(self._look_every * 1.3, LOOK_S[1])

    # -- submitting ---------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Adopts what is at work already, and submits the rest. Raises SlurmAway; the next call goes on from there."""
        if self._new:
            fresh = self._adopt(self._new)
            self._unsent += [self._journal(works) for works in self._batches(fresh)]
            self._new.clear()
        while self._unsent:
            submission, works = self._unsent[0]
            self._submit(submission)
            for index, work in enumerate(works):
                self._active.append(_Active(work, submission, index))
            what = f"{len(works)} trials" if len(works) > 1 else f"trial {works[0].number}"
            self._say(f"{what}: job {submission.job}{self._array_words(len(works)) if submission.is_array else ''}")
            del self._unsent[0]
            self._hurry()

    def _batches(self, works: list[Work]) -> list[list[Work]]:
        size = LARGEST_ARRAY if self._is_grid else 1
        return [works[start : start + size] for start in range(0, len(works), size)]

    def _array_words(self, size: int) -> str:
        return f"_[0-{size - 1}]"

    def _journal(self, works: list[Work]) -> tuple[Submission, list[Work]]:
        """Writes the script and the journal's entry, before anything is submitted."""
        sweep = sweep_folder(works[0].run_dir).resolve()
        facts = {
            "max_requeues": self.settings.max_requeues,
            "container": self.settings.container.runtime is not ContainerRuntime.none,
        }
        tasks = [Task(work.run_dir.resolve(), tuple(_arguments(work))) for work in works]
        submission = Submission.begin(sweep, sweep.name, tasks, is_array=len(tasks) > 1, facts=facts)
        program = self._program
        if self.settings.snapshot:
            self._code = self._code or snapshot(sweep / FOLDER / "code")
            program = self._with_presets(sweep)
            self._refuse_shadowed_code()
        script = render_script(
            self.settings,
            name=submission.name,
            folder=submission.folder,
            program=program,
            runs=[(task.run_dir, task.overrides) for task in tasks],
            is_array=submission.is_array,
            code=self._code,
        )
        submission.write(script)
        return submission, works

    def _refuse_shadowed_code(self) -> None:
        """Before Python 3.11 nothing keeps ``python -m`` from importing what lies in the folder where it starts."""
        if sys.version_info < (3, 11) and Path("mgm_exp").is_dir():
            raise UserError(
                f"With Python {sys.version_info[0]}.{sys.version_info[1]}, jobs that start in {Path.cwd()} would run "
                "the package that lies there, and not the copy that was made for them.",
                advice="Start the sweep in another folder, take Python 3.11, or give hydra.launcher.snapshot=false.",
            )

    def _with_presets(self, sweep: Path) -> list[str]:
        """The program, with a copy of the user's own presets in their place."""
        program = list(self._program)
        for number, word in enumerate(program[:-1]):
            if word == "--config-dir":
                source = Path(program[number + 1]).expanduser().resolve()
                program[number + 1] = str(copy_presets(source, sweep / FOLDER / "presets"))
        return program

    def _submit(self, submission: Submission) -> None:
        """Once: after an answer that came too late, or a death in the middle, the job is looked for first."""
        if submission.is_marked("sent", 0) and submission.find(self._slurm):
            return
        submission.mark("sent", 0)
        with submission.sending() as descriptor:
            number = self._slurm.submit(submission.script, self._environment(), [descriptor])
        submission.note_number(number)

    def _environment(self) -> dict[str, str]:
        """What jobs inherit: nothing of a job that this command itself may run in, and no secrets where told so."""
        from mgm_exp.bootstrap import PARENT
        from mgm_exp.record import is_secret_name

        def is_handed_on(name: str) -> bool:
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_")):
                return name == "SLURM_CONF"
            return name != PARENT and (self.settings.secrets or not is_secret_name(name))

        return {name: value for name, value in os.environ.items() if is_handed_on(name)}

    # -- picking up what another command left -------------------------------------------------------------------

    def _adopt(self, works: Sequence[Work]) -> list[Work]:
        """Takes over jobs that an earlier command submitted for these runs; gives the runs that have none."""
        fresh, known = [], []
        numbers: dict[str, str | None] = {}
        for work in works:
            found = latest_of(sweep_folder(work.run_dir).resolve(), work.run_dir)
            if found is None or found[0].is_marked("collected", found[1]):
                fresh.append(work)
                continue
            submission, index = found
            if submission.id not in numbers:
                numbers[submission.id] = submission.find(self._slurm)
            if numbers[submission.id] is None:
                fresh.append(work)
            else:
                known.append(_Active(work, submission, index))
        silent = [active for active in known if active.index not in active.submission.ended()]
        states = self._slurm.states(active.job for active in silent)
        for active in known:
            active.state = states.get(active.job)
            ending = active.submission.ending(active.index)
            is_interrupted = ending.get("exit_code") == _EXIT_INTERRUPTED and not ending.get("lost")
            is_cancelled = active.state is not None and active.state.state == "CANCELLED"
            if is_interrupted or (is_cancelled and not ending):
                fresh.append(active.work)
                continue
            how = "has ended" if ending else f"goes on ({active.state})" if active.state else "is not known any more"
            self._say(f"trial {active.work.number}: its job {active.job} {how}")
            self._active.append(active)
        return fresh

    # -- how they end ------------------------------------------------------------------------------------------

    def _look(self) -> list[tuple[Work, Ending]]:
        found = []
        ended = {active.submission.id: active.submission for active in self._active}
        done = {key: submission.ended() for key, submission in ended.items()}
        for active in list(self._active):
            if active.index in done[active.submission.id]:
                ending = self._told(active)
                if ending is not None:
                    found.append(self._collect(active, ending))
        if time.monotonic() >= self._ask_at and self._active:
            self._when_slurm_answers(self._ask)
        for active in list(self._active):
            ending = self._seen(active)
            if ending is not None:
                found.append(self._collect(active, ending))
        return found

    def _ask(self) -> None:
        """One question for all jobs."""
        now = time.monotonic()
        states = self._slurm.states(active.job for active in self._active)
        is_quiet = True
        for active in self._active:
            state = states.get(active.job)
            if state is None:
                active.unknown_since = active.unknown_since or now
            else:
                active.unknown_since = None
                if state.is_over and active.over_since is None:
                    active.over_since = now
                is_quiet = is_quiet and active.state is not None and active.state.state == state.state
                self._say_what_changed(active, state)
                active.state = state
        is_quiet = is_quiet and not any(active.unknown_since or active.over_since for active in self._active)
        self._ask_every = min(self._ask_every * 1.5, ASK_S[1]) if is_quiet else ASK_S[0]
        self._ask_at = time.monotonic() + self._ask_every

    def _say_what_changed(self, active: _Active, state: JobState) -> None:
        before = active.state.state if active.state else ""
        if ("held" in state.reason.lower() or "HOLD" in state.state) and not active.is_held:
            active.is_held = True
            self._say(
                f"trial {active.work.number}: its job {active.job} is held ({state.reason}); "
                f"`scontrol release {active.job}` lets it go on, `scancel {active.job}` ends it"
            )
        if before in ("RUNNING", "COMPLETING") and state.state == "PENDING":
            self._say(f"trial {active.work.number}: its job {active.job} is back in the queue ({state.reason})")

    def _told(self, active: _Active) -> Ending | None:
        """What a job says of its own end; None where Slurm has to be asked, too."""
        facts = active.submission.ending(active.index)
        if not facts:
            return None
        code, reason = int(facts["exit_code"]), str(facts.get("reason") or "")
        words = last_words(active.work.run_dir / "output.txt")
        if facts.get("lost"):
            return Ending(1, how=f"{reason} ({active.place})")
        if code == _EXIT_INTERRUPTED:
            return Ending(code, set_aside=f"{reason or 'stopped'} ({active.place})")
        if code >= 0:
            return Ending(code, output=words, how=f"{words} ({active.place})" if self._is_lost(active, code) else "")
        # Killed: by the kernel for memory, or by somebody? Slurm says so once the job is over.
        if active.over_since is None and active.unknown_since is None:
            self._hurry()
            return None
        memory = active.state is not None and active.state.state == "OUT_OF_MEMORY"
        return Ending(code, out_of_memory=memory, output=words, how=f"its process {_killed(code)} ({active.place})")

    def _is_lost(self, active: _Active, code: int) -> bool:
        """Whether it ended by itself and left nothing: not even a result that says why."""
        if code in (0, _EXIT_USER_ERROR):
            return False
        try:
            written = (active.work.run_dir / "result.json").stat().st_mtime
        except FileNotFoundError:
            return True
        return written < active.submission.submitted_at

    def _seen(self, active: _Active) -> Ending | None:
        """What Slurm says of the end of a job that says nothing itself."""
        now = time.monotonic()
        if active.unknown_since is not None and now - active.unknown_since > UNKNOWN_S:
            return Ending(1, how=f"its job is not known to Slurm any more and left no result ({active.place})")
        if active.state is None or active.over_since is None or now - active.over_since < SETTLE_S:
            return None
        if active.index in active.submission.ended():
            return None
        state = active.state.state
        if state == "CANCELLED":
            return Ending(_EXIT_INTERRUPTED, set_aside=f"its job was cancelled ({active.place})")
        if state == "OUT_OF_MEMORY":
            return Ending(-9, out_of_memory=True, how=f"OUT_OF_MEMORY: {active.place}")
        how = f"its job ended as {state} and left no result"
        if state == "TIMEOUT":
            limit = f"hydra.launcher.timeout_min={self.settings.timeout_min}"
            how = f"its time was up ({limit}) before it could go back into the queue"
        return Ending(1, how=f"{how} ({active.place})")

    def _collect(self, active: _Active, ending: Ending) -> tuple[Work, Ending]:
        self._active.remove(active)
        active.submission.mark("collected", active.index)
        self._hurry()
        return active.work, ending

    def _hurry(self) -> None:
        """Something has happened, and the next thing may follow soon."""
        self._ask_every, self._look_every = ASK_S[0], LOOK_S[0]
        self._ask_at = min(self._ask_at, time.monotonic() + ASK_S[0])

    def _when_slurm_answers(self, question: Callable[[], None]) -> None:
        """Asks; where there is no answer, says so once and asks again later."""
        try:
            question()
        except SlurmAway as away:
            if not self._is_away:
                self._say(f"Slurm does not answer ({away}); jobs that run go on, and so does this sweep once it does")
                self._ask_every = ASK_S[0]
            self._is_away = True
            self._ask_every = min(self._ask_every * 1.5, ASK_S[1])
            self._ask_at = time.monotonic() + self._ask_every
            return
        if self._is_away:
            self._is_away = False
            self._say("Slurm answers again")

    # -- stopping -----------------------------------------------------------------------------------------------

    def stop(self) -> list[tuple[Work, Ending]]:
        """Cancels what waits, and lets what runs save its state and end."""
        found: list[tuple[Work, Ending]] = []
        self._new.clear()
        if not self._waits:  # they are to go on without us
            return found
        if self._active or self._unsent:
            self._say("stopping: jobs that wait are cancelled, those that run save their state (again: leave them)")
        told_at = -60.0
        while self._active or self._unsent:
            for submission, _ in self._unsent:
                submission.mark("stop", 0)
            for active in self._active:
                if not active.submission.is_marked("stop", active.index):
                    active.submission.mark("stop", active.index)
            if time.monotonic() - told_at > 5.0:
                told_at = time.monotonic()
                self._when_slurm_answers(self._tell_to_stop)
            found += self._look()
            time.sleep(0.2)
        return found

    def _tell_to_stop(self) -> None:
        for submission, works in [*self._unsent]:
            if submission.is_marked("sent", 0) and submission.find(self._slurm):
                self._active += [_Active(work, submission, index) for index, work in enumerate(works)]
            self._unsent.remove((submission, works))
        jobs = [active.job for active in self._active]
        if jobs:
            self._slurm.cancel(jobs, waiting_only=True)
            self._slurm.ask_to_stop(jobs)
            self._ask_at = 0.0


def _arguments(work: Work) -> list[str]:
    from mgm_exp.command import quoted

    return [*work.overrides, f"hydra.run.dir={quoted(str(work.run_dir.resolve()))}", "hydra.mode=RUN"]


def _killed(code: int) -> str:
    import signal

    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def slots_of(
    settings: SlurmConfig,
    config: Any,
    program: Sequence[str],
    *,
    is_grid: bool,
    say: Callable[[str], None] | None = None,
) -> SlurmSlots:
    """The slots of a sweep with this configuration.

    Raises:
        ConfigError: the run needs more devices than its job would have.
        MissingDependencyError: this machine has no Slurm.
    """
    from mgm_exp.errors import ConfigError
    from mgm_exp.slurm import check_commands

    gpus = settings.gpus_per_node
    if gpus is not None and config.devices > gpus * settings.nodes:
        raise ConfigError(
            f"devices={config.devices} is more than the job has: hydra.launcher.nodes={settings.nodes} x "
            f"gpus_per_node={gpus}.",
            advice="Ask for more nodes or GPUs, or set devices to what there is.",
        )
    check_commands()
    size = 10**6 if is_grid else config.sweep.slots or 1
    return SlurmSlots(settings, program, size, is_grid=is_grid, waits=config.launch.wait, say=say or _say)


def _say(text: str) -> None:
    print(text, flush=True)
    sys.stdout.flush()
