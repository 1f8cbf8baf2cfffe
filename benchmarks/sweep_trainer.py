"""Eight LoRA trials: our sweep against what a user would do instead, and what one run of both says beside it.

The peers are processes of :mod:`benchmarks.peers`: transformers' Trainer with PEFT, one process a trial, one after
another; the same stopped by Optuna's SuccessiveHalvingPruner; the Trainer, accelerate and plain PyTorch step by step.
Both sides train the model of :mod:`benchmarks.prototype` on the same rows in the same order with the same first values
and dropout masks, and answer the same held-out questions. Ours is the command that a user types. CPU time of whole
process trees, start included; the Trainer's trials and our sweeps take turns.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row
from benchmarks.prototype import Prototype, make_prototype

STEPS, BATCH = 16, 4
STEPS_QUICK, TRIALS_QUICK = 4, 2
REPEATS_LOOP = 3
# rank, alpha, learning rate, dropout
POINTS: tuple[tuple[int, int, float, float], ...] = (
    (8, 16, 2e-4, 0.0),
    (2, 4, 5e-4, 0.0),
    (16, 32, 5e-3, 0.05),
    (4, 16, 1e-2, 0.0),
    (16, 64, 1e-3, 0.1),
    (8, 8, 2e-3, 0.0),
    (4, 4, 2e-2, 0.0),
    (2, 8, 3e-3, 0.1),
)
KEYS = ("adapter.rank", "adapter.alpha", "train.lr", "adapter.dropout")
TRAINED = (
    "train.warmup_ratio=0",
    f"train.global_batch_size={BATCH}",
    f"train.micro_batch_size={BATCH}",
    "train.checkpoint.every_steps=null",
)
SEARCH = (
    "hydra/sweeper=mgm_optuna",
    "adapter.rank=choice(2,4,8,16)",
    "adapter.alpha=choice(4,8,16,32,64)",
    "train.lr=tag(log,interval(1e-5,1e-1))",
    "adapter.dropout=interval(0,0.2)",
    "sweep.pruner.name=none",
)
RUNGS = (
    "sweep.pruner.name=rungs",
    "sweep.pruner.reduction_factor=2",
    "train.validation.every_steps=2",
    "train.validation.questions=32",
)
# How far two losses may be apart that are sums of the same numbers in another order.
NEAR = 5e-6
BIT_EQUAL, TOLERANCE, OTHER_BATCHES, ASHA, ASHA_OPTUNA, LOOP, MEMORY = 2.1, 3.0, 4.0, 8.0, 2.5, 1 / 1.03, 1 / 0.6


def run(work: Path, quick: bool = False) -> list[Row]:
    """All rows, from one run of the Trainer's trials."""
    steps, points = (STEPS_QUICK, POINTS[:TRIALS_QUICK]) if quick else (STEPS, POINTS)
    made = make_prototype(work / "prototype", **({"images": 24, "asked": 8, "taught": 0} if quick else {}))
    bench = _Bench(work, made, steps, points)
    half = len(points) // 2
    peers = [bench.trainer(number) for number in range(half)]
    ours = bench.sweep("bit_equal")
    peers += [bench.trainer(number) for number in range(half, len(points))]
    packed = bench.sweep("packed", "hydra/launcher=packed")
    grouped = bench.sweep("grouped", "hydra/launcher=packed", "train.group_by=length")
    alone = bench.fresh(len(points) - 1)
    rows = _sweep_rows(bench, peers, ours, packed, grouped, alone, quick)
    rows += _rung_rows(bench, peers, ours, bench.sweep("rungs", *RUNGS), bench.pruned_trainers(), quick)
    return rows + _step_rows(bench, quick)


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


class _Bench:
    """The two sides, with the folders they share."""

    def __init__(
        self, work: Path, made: Prototype, steps: int, points: Sequence[tuple[int, int, float, float]]
    ) -> None:
        self.work, self.made, self.steps, self.points = work, made, steps, points
        self.overrides = [*made.overrides(), *TRAINED, f"train.max_steps={steps}"]

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

    def trainer(self, number: int, **more: Any) -> dict[str, Any]:
        """One trial of the Trainer's."""
        trial = {**self.trial(number), "asked": str(self.made.asked), **more}
        return self._alone("benchmarks.peers.trainer_peft", trial, f"trainer_{number}")

    def own_loop(self, engine: str, **more: Any) -> dict[str, Any]:
        """One trial of a loop on ``engine``."""
        return self._alone("benchmarks.peers.own_loop", {**self.trial(0), "engine": engine, **more}, engine)

    def stage(self, name: str, *, cached: bool) -> dict[str, Any]:
        """The instruct stage of our first trial, alone in a process, on what the first sweep curated; ``cached``: with
        the visual tokens that it kept."""
        from mgm_exp.compose import compose
        from mgm_exp.config import plain
        from mgm_exp.train import TrainJob

        point = [f"{key}={value}" for key, value in self._keys(self.points[0]).items()]
        config = compose([*self.overrides, *point, f"train.cache_visual_tokens={str(cached).lower()}"])
        store = self.work / "bit_equal" / "store"
        rows = next((store / "curate").glob("*/instruct.jsonl"))
        tokens = next(path for path in (store / "features").iterdir() if path.is_dir()) if cached else None
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        job = TrainJob("instruct", plain(config), rows, self.made.images, None, tokens, folder / "work")
        (folder / "job.json").write_text(job.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.peers.our_stage", str(folder / "job.json"), str(folder / "r.json")]
        cpu_of(command, folder / "log.txt")
        return dict(json.loads((folder / "r.json").read_text(encoding="utf-8")))

    def pruned_trainers(self) -> tuple[float, list[float | None], int]:
        """The Trainer's processes one after another under Optuna's pruner: CPU seconds, scores, steps that were run."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
        study = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
        rungs = [step for step in (2, 4, 8) if step < self.steps]
        seconds, done = 0.0, 0
        scores: list[float | None] = []
        for number in range(len(self.points)):
            trial = study.ask()

            def decide(step: int, value: float, trial: Any = trial) -> bool:
                trial.report(value, step)
                return bool(trial.should_prune())

            told = {**self.trial(number), "asked": str(self.made.asked), "rungs": rungs}
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
    """CPU seconds of a process and all that it waited for; what it asks at its rungs is answered by ``decide``.

    Raises:
        RuntimeError: It failed; what it printed last.
    """
    with open(log, "w+", encoding="utf-8") as file:
        pipe = subprocess.PIPE if decide else None
        process = subprocess.Popen(command, stdout=pipe or file, stdin=pipe, stderr=file, text=True)
        if decide:
            assert process.stdout is not None and process.stdin is not None
            for line in process.stdout:
                if line.startswith('{"step"'):
                    asked = json.loads(line)
                    process.stdin.write("stop\n" if decide(asked["step"], asked["value"]) else "go on\n")
                    process.stdin.flush()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            file.seek(0)
            raise RuntimeError(f"{command[1:4]} ended with {process.returncode}:\n{file.read()[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def losses_of(run: Path) -> list[float]:
    """Loss of each step of the instruct stage."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if row["stage"] == "instruct" and "event" not in row]


def apart(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest difference of two losses of the same step, relative."""
    return max(
        abs(a - b) / abs(b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


def _is_bit_equal(trial: Path, fresh: Path) -> bool:
    """Losses, adapter and answers of a trial in a sweep and in a process of its own."""
    same_losses = losses_of(trial) == losses_of(fresh)
    files = ("adapter/adapter_model.safetensors", "predictions/custom.jsonl")
    said = [[(folder / name).read_bytes() for folder in (trial, fresh)] for name in files]
    predictions = [[json.loads(line)["prediction"] for line in text.decode().splitlines()] for text in said[1]]
    return same_losses and said[0][0] == said[0][1] and predictions[0] == predictions[1]


def _sweep_rows(
    bench: _Bench,
    peers: list[dict[str, Any]],
    ours: Sweep,
    packed: Sweep,
    grouped: Sweep,
    alone: Path,
    quick: bool,
) -> list[Row]:
    theirs = sum(peer["cpu_s"] for peer in peers)
    losses, scores = [peer["losses"] for peer in peers], [peer["score"] for peer in peers]
    number = len(peers) - 1
    is_equal = _is_bit_equal(ours.folder / str(number), alone)
    loaded = sum(peer["loaded_s"] for peer in peers)
    step = statistics.median(second for peer in peers for second in peer["step_s"])
    how = (
        f"{len(peers)} trials of {bench.steps} steps of {BATCH} rows, {len(peers)} processes of Trainer and PEFT: "
        f"{loaded:.0f} s of them imports and loading, {step:.2f} s a step"
    )
    near = f"losses of all steps within {{:.1g}} of the Trainer's; winner: trial {{}}, the Trainer's {best(scores)}"

    def against(sweep: Sweep) -> str:
        found = apart(sweep.losses, losses)
        differ = found > NEAR or sweep.winner != best(scores)
        return near.format(found, sweep.winner) + (": they DIFFER" if differ else "")

    def row(what: str, sweep: Sweep, goal: float, exactness: str, more: str) -> Row:
        return Row(f"sweep8, {what}", "s", sweep.cpu_s, theirs, None if quick else goal, exactness, f"{how}; {more}")

    equal = f"trial {number} (with dropout) and the same run in a process of its own, nothing cached: "
    equal += "losses, adapter and answers bit-equal" if is_equal else "they DIFFER"
    apart_packed = apart(packed.losses, ours.losses)
    tolerance = f"losses within {apart_packed:.1g} of the bit-equal sweep's"
    tolerance += "" if apart_packed <= NEAR and packed.winner == ours.winner else ": they DIFFER"
    return [
        row("bit-equal", ours, BIT_EQUAL, f"{equal}; {against(ours)}", "one command, nothing in its store before"),
        row("tolerance", packed, TOLERANCE, f"{tolerance}; winner: trial {packed.winner}", "hydra/launcher=packed"),
        row(
            "other batches",
            grouped,
            OTHER_BATCHES,
            f"rows of like length are together: other batches, losses not compared; winner: trial {grouped.winner}",
            "hydra/launcher=packed train.group_by=length",
        ),
    ]


def _rung_rows(
    bench: _Bench,
    peers: list[dict[str, Any]],
    ours: Sweep,
    rungs: Sweep,
    pruned: tuple[float, list[float | None], int],
    quick: bool,
) -> list[Row]:
    cpu_s, scores, steps = pruned
    same = all(mine == full[: len(mine)] for mine, full in zip(rungs.losses, ours.losses, strict=True))
    exactness = (
        f"{'every trial is a bit-equal prefix of the full sweep' if same else 'losses DIFFER from the full sweep'}; "
        f"winner: trial {rungs.winner}, of the full sweep {ours.winner}"
        f"{'' if rungs.winner == ours.winner else ': they DIFFER'}, of Optuna's pruner {best(scores)}"
    )
    done, all_steps = sum(map(len, rungs.losses)), bench.steps * len(bench.points)
    how = f"rungs at 2, 4 and 8 of {bench.steps} steps, half go on: {done} of {all_steps} steps"
    theirs = sum(peer["cpu_s"] for peer in peers)
    return [
        Row(
            "sweep8 + rungs, and all trials of the Trainer",
            "s",
            rungs.cpu_s,
            theirs,
            _goal(ASHA, quick),
            exactness,
            how,
        ),
        Row(
            "sweep8 + rungs, and Optuna's pruner over the Trainer's processes",
            "s",
            rungs.cpu_s,
            cpu_s,
            _goal(ASHA_OPTUNA, quick),
            exactness,
            f"{how}; SuccessiveHalvingPruner(min_resource=2, reduction_factor=2), scored at its rungs by the same "
            f"questions: {steps} steps",
        ),
    ]


def _step_rows(bench: _Bench, quick: bool) -> list[Row]:
    """Our loop against the Trainer's on the same work, and memory of both."""
    same: dict[str, Any] = {"label_head": True}
    ours, theirs = [], []
    for repeat in range(1 if quick else REPEATS_LOOP):
        sides: list[tuple[list[dict[str, Any]], Callable[[], dict[str, Any]]]] = [
            (ours, lambda: bench.stage("stage", cached=False)),
            (theirs, lambda: bench.trainer(0, **same)),
        ]
        for found, side in sides if repeat % 2 == 0 else reversed(sides):
            found.append(side())
    others = {engine: bench.own_loop(engine, **same) for engine in ("torch", "accelerate")}
    full = bench.trainer(0)
    cached = bench.stage("cached_stage", cached=True)
    far = apart([ours[0]["losses"]] * 2, [theirs[0]["losses"], others["accelerate"]["losses"]])
    exactness = f"losses within {far:.1g}: the same work{'' if far <= NEAR else ', they DIFFER'}"
    ratios = [paired(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    step = statistics.median(ours[0]["step_s"])
    beside = ", ".join(f"{name} {paired(ours[0], found):.2f}" for name, found in others.items())
    return [
        Row(
            "a step of the loop, and the Trainer's",
            "s",
            step,
            step * ratio,
            _goal(LOOP, quick),
            exactness,
            f"images decoded and encoded in each step, the loss at supervised positions on both sides; ratio of the "
            f"same step's CPU time, median over steps, of {len(ratios)} alternated repeats "
            f"({', '.join(f'{value:.2f}' for value in ratios)}); against ours: {beside}",
        ),
        Row(
            "memory above the loaded process, and the Trainer's",
            "MiB",
            ours[0]["above_mib"],
            full["above_mib"],
            _goal(MEMORY, quick),
            "the same trial, each as it is",
            f"highest resident memory while training less what is resident once all is loaded; with cached visual "
            f"tokens {cached['above_mib']:.0f} MiB; the Trainer with our loss {theirs[0]['above_mib']:.0f} MiB",
        ),
    ]


def paired(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Median over the steps of how many times longer the other side takes for the same step; the first is left out."""
    pairs = zip(ours["step_s"][1:], theirs["step_s"][1:], strict=True)
    return statistics.median(other / mine for mine, other in pairs)


def _goal(goal: float, quick: bool) -> float | None:
    return None if quick else goal
