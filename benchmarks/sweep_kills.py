"""Three workers on one study, one of them killed again and again: ours, and Optuna's own ``optimize`` in each worker.

Ours ends with exactly the trials that were asked for, each run once apart from the step that a kill cut off. Plain
Optuna, with the same journal file and the same kills, leaves the killed trials running for ever and begins others in
their place. What is counted is trials begun for each trial that was asked for: 1 is none too many.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measurement import Row

TRIALS, KILLS = 60, 25
TRIALS_QUICK, KILLS_QUICK = 12, 4
STEP_S = 0.4
PLAIN = """
import sys, time, optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
optuna.logging.set_verbosity(optuna.logging.WARNING)
path, trials, step_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)

def objective(trial):
    print("trial", trial.number, flush=True)
    time.sleep(2 * step_s)
    return trial.suggest_float("x", 0, 1)

while sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)) < trials:
    study.optimize(objective, n_trials=1)
"""


def run(work: Path, quick: bool = False) -> list[Row]:
    """Runs both under the same kills."""
    from tests.search.test_crash_points import chaos

    trials, kills = (TRIALS_QUICK, KILLS_QUICK) if quick else (TRIALS, KILLS)
    rows = []
    for storage in ("journal", "sqlite"):
        (work / storage).mkdir()
        found = chaos(work / storage / "s", storage, trials=trials, kills=kills, step_s=STEP_S)
        begun, running = _plain(work / f"{storage}.plain", trials, kills)
        rows.append(
            Row(
                f"{kills} kills, three workers, {storage}: trials begun for each one asked for",
                "trials",
                1.0,
                begun / trials,
                1.0,
                f"ours: {trials} of {trials} completed, 0 lost, 0 left running, 0 run twice "
                f"({found['repeated_steps']} of {2 * trials} steps repeated after a kill)",
                f"{found['kills']} kills of working sweepers; Optuna's optimize with a journal file: {begun} trials "
                f"begun, {running} left running for ever",
            )
        )
    return rows


def _plain(journal: Path, trials: int, kills: int) -> tuple[int, int]:
    """Trials that plain Optuna began, and those that it left running."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PLAIN, str(journal), str(trials), str(STEP_S)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    chance, workers = random.Random(0), [start() for _ in range(3)]
    for _ in range(kills):
        victim = chance.randrange(3)
        said = workers[victim].stdout
        assert said is not None
        said.readline()
        time.sleep(chance.random() * 2.5 * STEP_S)
        workers[victim].kill()
        workers[victim].communicate()
        workers[victim] = start()
    for worker in workers:
        worker.communicate()
    study = optuna.load_study(storage=JournalStorage(JournalFileBackend(str(journal))), study_name="s")
    running = sum(not trial.state.is_finished() for trial in study.trials)
    return len(study.trials), running
