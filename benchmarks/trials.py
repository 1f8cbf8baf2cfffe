"""The eight LoRA trials of the sweep benchmarks: as sweeps of ours, and as processes of :mod:`benchmarks.peers`.

Both sides train the model of :mod:`benchmarks.prototype` on the same rows in the same order with the same first values
and dropout masks, and answer the same held-out questions. Ours is the command that a user types. CPU time is that of
whole process trees, start included.
"""

from __future__ import annotations

import compileall
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.prototype import TAUGHT, Prototype, make_prototype

STEPS, BATCH = 16, 4
STEPS_QUICK, TRIALS_QUICK = 4, 3
# rank, alpha, learning rate, dropout. Rates at which training is calm: where gradients jump, Adam makes of the last bit
# of a sum another run within a few steps, and nothing could be compared. So calm, and so short, that most scores are
# equal in the end: of equals the lower number wins.
POINTS: tuple[tuple[int, int, float, float], ...] = (
    (8, 16, 2e-4, 0.0),
    (2, 4, 5e-4, 0.0),
    (16, 32, 1e-3, 0.05),
    (4, 16, 5e-4, 0.0),
    (16, 64, 3e-4, 0.1),
    (8, 8, 1e-3, 0.0),
    (4, 4, 5e-5, 0.0),
    (2, 8, 1e-3, 0.1),
)
KEYS = ("adapter.rank", "adapter.alpha", "train.lr", "adapter.dropout")
TRAINED = (
    "train.warmup_ratio=0",
    f"train.global_batch_size={BATCH}",
    f"train.micro_batch_size={BATCH}",
    "train.checkpoint.every_steps=null",
    "train.cache_visual_tokens=false",
)
# Bit-equal to a run without it, in training and evaluation.
CACHED = "train.feature_cache=tokens"
SEARCH = (
    "hydra/sweeper=mgm_optuna",
    "adapter.rank=choice(2,4,8,16)",
    "adapter.alpha=choice(4,8,16,32,64)",
    "train.lr=tag(log,interval(1e-5,1e-1))",
    "adapter.dropout=interval(0,0.2)",
    "sweep.pruner.name=none",
)
# How far two losses may be apart, relatively, whose sums were taken in another order: a last bit at the first step, of
# which 16 steps of Adam made 6e-6 at most. (It was 5e-6 before that was seen.)
NEAR = 2e-5


def prepared(work: Path, quick: bool, taught: int = TAUGHT) -> Bench:
    """Model and data, and what runs the trials on them; ``taught``: steps of the model before them."""
    small = {"images": 24, "asked": 8, "taught": 0}
    made = make_prototype(work / "prototype", **(small if quick else {"taught": taught}))
    steps, points = (STEPS_QUICK, POINTS[:TRIALS_QUICK]) if quick else (STEPS, POINTS)
    for package in ("mgm_exp", "launcher", "benchmarks"):  # bytecode, as what is installed has it
        compileall.compile_dir(Path(__file__).parents[1] / package, quiet=2)
    return Bench(work, made, steps, points)


@dataclass(frozen=True)
class Sweep:
    """What one of our sweeps took and found: losses and scores by trial (None: it did not complete)."""

    cpu_s: float
    losses: list[list[float]]
    scores: list[float | None]
    folder: Path

    @property
    def winner(self) -> int:
        return best(self.scores)


def best(scores: Sequence[float | None]) -> int:
    """The first of the best trials."""
    known = [-1.0 if score is None else score for score in scores]
    return known.index(max(known))


class Bench:
    """The two sides, with the folders they share."""

    def __init__(
        self, work: Path, made: Prototype, steps: int, points: Sequence[tuple[int, int, float, float]]
    ) -> None:
        self.work, self.made, self.steps, self.points = work, made, steps, points
        self.overrides = [*made.overrides(), *TRAINED, f"train.max_steps={steps}"]

    @property
    def rungs(self) -> list[int]:
        """Steps at which half of the trials may go on."""
        return [step for step in (2, 4, 8) if step < self.steps]

    def sweep(self, name: str, *more: str) -> Sweep:
        """One of our sweeps over all points, with a store of its own: nothing is there before it."""
        root = self.work / name
        enqueued = ",".join("{" + ",".join(f"{k}: {v}" for k, v in self._keys(p).items()) + "}" for p in self.points)
        command = [sys.executable, "-m", "mgm_exp", "-m", *SEARCH, *self.overrides, f"sweep.enqueue=[{enqueued}]"]
        command += [f"sweep.n_trials={len(self.points)}", "sweep.name=s", f"paths.root={root}", *more]
        seconds = cpu_of(command, self.work / f"{name}.log")
        folder = root / "sweeps" / "s"
        trials = sorted(json.loads((folder / "sweep.json").read_text("utf-8"))["trials"], key=lambda t: t["number"])
        assert len(trials) == len(self.points), f"{name}: {len(trials)} trials"
        return Sweep(
            seconds,
            [losses_of(folder / str(trial["number"])) for trial in trials],
            [trial["metrics"].get("custom/accuracy") if trial["status"] == "completed" else None for trial in trials],
            folder,
        )

    def fresh(self, number: int) -> Path:
        """The run folder of one trial as a process of its own makes it, everything computed anew."""
        root = self.work / "fresh"
        point = [f"{key}={value}" for key, value in self._keys(self.points[number]).items()]
        command = [sys.executable, "-m", "mgm_exp", *self.overrides, *point, f"paths.root={root}", "name=f"]
        cpu_of(command, self.work / "fresh.log")
        return next((root / "runs" / "f").iterdir())

    def trainer(self, number: int, trial: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """One trial of the Trainer's; what it is told can be given: composing a configuration is for one thread."""
        trial = {**(trial or self.trial(number)), "asked": str(self.made.asked), **more}
        return self._alone("benchmarks.peers.trainer_peft", trial, f"trainer_{number}")

    def floor(self, name: str, trials: Sequence[dict[str, Any]], rungs: Sequence[int]) -> dict[str, Any]:
        """Trials in one process with nothing around them."""
        overrides = [
            [*self.overrides, *(f"{key}={value}" for key, value in self._keys(point).items())] for point in self.points
        ]
        told = {"trials": list(trials), "overrides": overrides, "asked": str(self.made.asked), "rungs": list(rungs)}
        return self._alone("benchmarks.peers.floor", told, name)

    def own_loop(self, engine: str, trial: dict[str, Any], **more: Any) -> dict[str, Any]:
        """One trial of a loop on ``engine``."""
        return self._alone("benchmarks.peers.own_loop", {**trial, "engine": engine, **more}, engine)

    def curated(self) -> Path:
        """The rows of the instruct stage, curated by a command of ours."""
        store = self.work / "curated"
        command = [sys.executable, "-m", "mgm_exp.cli", "curate", *self.overrides, f"paths.root={store}"]
        cpu_of(command, self.work / "curated.log")
        return next((store / "store" / "curate").glob("*/instruct.jsonl"))

    def stage(self, name: str, rows: Path, *more: str) -> dict[str, Any]:
        """The instruct stage of our first trial, alone in a process, on curated rows."""
        from mgm_exp.compose import compose
        from mgm_exp.config import plain
        from mgm_exp.train import TrainJob

        point = [f"{key}={value}" for key, value in self._keys(self.points[0]).items()]
        config = compose([*self.overrides, *point, *more])
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        job = TrainJob("instruct", plain(config), rows, self.made.images, None, None, folder / "work")
        (folder / "job.json").write_text(job.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.peers.our_stage", str(folder / "job.json"), str(folder / "r.json")]
        cpu_of(command, folder / "log.txt")
        return dict(json.loads((folder / "r.json").read_text(encoding="utf-8")))

    def pruned_trainers(self, trials: Sequence[dict[str, Any]]) -> tuple[float, list[float | None], int]:
        """The Trainer's processes one after another under Optuna's pruner: CPU seconds, scores, steps that were run."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
        study = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
        seconds, done = 0.0, 0
        scores: list[float | None] = []
        for number in range(len(self.points)):
            trial = study.ask()

            def decide(step: int, value: float, trial: Any = trial) -> bool:
                trial.report(value, step)
                return bool(trial.should_prune())

            told = {**trials[number], "asked": str(self.made.asked), "rungs": self.rungs}
            found = self._alone("benchmarks.peers.trainer_peft", told, f"pruned_{number}", decide)
            seconds, done = seconds + found["cpu_s"], done + len(found["losses"])
            scores.append(found["score"])
            pruned = optuna.trial.TrialState.PRUNED
            study.tell(trial, found["score"], state=pruned if found["score"] is None else None)
        return seconds, scores, done

    def trial(self, number: int) -> dict[str, Any]:
        """What the peers are told of a trial, order and seeds as ours derives them."""
        from mgm_exp.compose import compose
        from mgm_exp.data import BatchPlan
        from mgm_exp.train.job import derived_seed, stage_settings

        rank, alpha, lr, dropout = self.points[number]
        config = compose([*self.overrides, f"train.lr={lr}"])
        settings = stage_settings(config, "instruct")
        count = len(json.loads(self.made.rows.read_text(encoding="utf-8")))
        plan = BatchPlan(
            [1] * count,
            [True] * count,
            global_batch_size=BATCH,
            micro_batch_size=BATCH,
            seed=derived_seed(settings.seed, "data order"),
            max_steps=self.steps,
        )
        return {
            "model": str(self.made.model),
            "rows": str(self.made.rows),
            "images": str(self.made.images),
            "rank": rank,
            "alpha": alpha,
            "lr": lr,
            "dropout": dropout,
            "warmup_steps": 0,
            "batch": BATCH,
            "beta2": settings.betas[1],
            "max_length": settings.max_length,
            "order": [plan.global_batch(step) for step in range(self.steps)],
            "dropout_seeds": [derived_seed(settings.seed, "dropout", step, 0) for step in range(self.steps)],
            "adapter_seed": derived_seed(config.seed, "adapter"),
        }

    def _keys(self, point: tuple[int, int, float, float]) -> dict[str, float]:
        return dict(zip(KEYS, point, strict=True))

    def _alone(
        self, module: str, trial: dict[str, Any], name: str, decide: Callable[[int, float], bool] | None = None
    ) -> dict[str, Any]:
        folder = self.work / "peers" / name
        folder.mkdir(parents=True, exist_ok=True)
        told, result = folder / "trial.json", folder / "result.json"
        told.write_text(json.dumps({**trial, "out": str(folder / "out")}), encoding="utf-8")
        cpu_of([sys.executable, "-m", module, str(told), str(result)], folder / "log.txt", decide)
        return dict(json.loads(result.read_text(encoding="utf-8")))


def cpu_of(command: Sequence[str], log: Path, decide: Callable[[int, float], bool] | None = None) -> float:
    """CPU seconds of a process and all its descendants; what it asks at its rungs is answered by ``decide``.

    Raises:
        RuntimeError: It failed; what it printed last.
    """
    seconds = log.with_suffix(".seconds")
    counted = [sys.executable, "-m", "benchmarks.peers.counted", str(seconds), *command]
    with open(log, "w+", encoding="utf-8") as file:
        pipe = subprocess.PIPE if decide else None
        process = subprocess.Popen(counted, stdout=pipe or file, stdin=pipe, stderr=file, text=True)
        if decide:
            assert process.stdout is not None and process.stdin is not None
            for line in process.stdout:
                if line.startswith('{"step"'):
                    asked = json.loads(line)
                    process.stdin.write("stop\n" if decide(asked["step"], asked["value"]) else "go on\n")
                    process.stdin.flush()
        if process.wait():
            file.seek(0)
            raise RuntimeError(f"{command[1:4]} ended with {process.returncode}:\n{file.read()[-3000:]}")
    return float(seconds.read_text(encoding="ascii"))


def losses_of(run: Path) -> list[float]:
    """Loss of each step of the instruct stage."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if row["stage"] == "instruct" and "event" not in row]


def apart(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest difference of two losses of the same step, relative."""
    return max(
        abs(a - b) / abs(b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


def near(far: float) -> str:
    return f"tolerance: losses of all steps {'within' if far <= NEAR else 'DIFFER:'} {far:.1g}"
