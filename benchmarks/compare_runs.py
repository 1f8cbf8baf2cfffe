"""A large sweep against its baseline: 200 runs, 5,000 questions, 3 benchmarks; from the files to the finished tables.

``mgm-exp report SWEEP`` is run as a process of its own, as a user would. Scores are soft on one benchmark (tenths, as
VQA accuracy gives), 0 and 1 on another, and of several questions an image on the third. What is true is known: some
runs are better or worse by three points, the others as good as the baseline.

There is no peer that does this; what is wanted stands in its place: 30 seconds and 2 GiB, all processes together.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measurement import Row

RUNS, QUESTIONS = 200, 5_000
RUNS_QUICK, QUESTIONS_QUICK = 12, 300
SECONDS, MIB = 30.0, 2_048.0
BETTER, WORSE = range(1, 11), range(11, 21)
"""Runs that differ from the first by a quarter of their answers' worth of skill."""


def run(work: Path, quick: bool) -> list[Row]:
    """Writes the sweep, and measures the verb with tables alone and with the page."""
    n_runs, n_questions = (RUNS_QUICK, QUESTIONS_QUICK) if quick else (RUNS, QUESTIONS)
    sweep = _write_sweep(work / "sweep", n_runs, n_questions)
    seconds, mib = _measured(sweep, sweep / "table.csv")
    verdict = _checked(json.loads((sweep / "comparison.json").read_text(encoding="utf-8")), n_runs)
    page_seconds, page_mib = _measured(sweep, sweep / "report.html")
    size = (sweep / "report.html").stat().st_size / 1024
    what = f"{n_runs} runs x {n_questions:,} questions x 3 benchmarks against their baseline"
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return [
        Row(f"{what}: time", "s", seconds, SECONDS, 1.0, verdict, f"mgm-exp report --out table.csv; {load}"),
        Row(f"{what}: memory", "MiB", mib, MIB, 1.0, verdict, "highest of the process and of each it started, summed"),
        Row(
            f"{what}, with the page: time",
            "s",
            page_seconds,
            SECONDS,
            None,
            verdict,
            f"mgm-exp report --out report.html: {size:,.0f} KiB, {page_mib:,.0f} MiB of memory",
        ),
    ]


def _checked(comparison: dict[str, Any], n_runs: int) -> str:
    """What was found beside what is true."""
    order = [entry["run_dir"] for entry in comparison["runs"]]
    pairs = comparison["pairs"]
    truth = {order[k]: "better" for k in BETTER if k < n_runs} | {order[k]: "worse" for k in WORSE if k < n_runs}
    opposite = sum({pair["verdict"], truth.get(pair["b"])} == {"better", "worse"} for pair in pairs)
    alarms = sum(pair["verdict"] != "tied" and pair["b"] not in truth for pair in pairs)
    found = sum(pair["verdict"] == truth[pair["b"]] for pair in pairs if pair["b"] in truth)
    of = sum(pair["b"] in truth for pair in pairs)
    is_right = len(pairs) == 3 * (n_runs - 1) and not opposite and alarms <= 1
    said = "as planted" if is_right else "DIFFERS from what was planted"
    return f"{said}: {found} of {of} true differences found, {alarms} false alarms in {len(pairs)} comparisons"


# -- the sweep ---------------------------------------------------------------------------------------------------------


def _write_sweep(folder: Path, n_runs: int, n_questions: int) -> Path:
    generator = np.random.default_rng(0)
    per_benchmark = {}
    for benchmark, per_image in (("textvqa", 1), ("mmbench", 1), ("gqa", 4)):
        heads = [_question(benchmark, k, per_image) for k in range(n_questions)]
        per_benchmark[benchmark] = (heads, generator.beta(1.2, 1.0, n_questions))
    trials = []
    for number in range(n_runs):
        settings = {"adapter": {"name": f"lora_{number:03d}"}, "train": {"lr": 1e-4 * (1 + number)}, "seed": 0}
        place = folder / str(number)
        (place / "predictions").mkdir(parents=True)
        (place / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        (place / "manifest.json").write_text(json.dumps({"seed": 0, "trainable": {"n_total": 1}}), encoding="utf-8")
        shift = 0.06 if number in BETTER else -0.06 if number in WORSE else 0.0
        metrics, keys = {}, {}
        for benchmark, (heads, skill) in per_benchmark.items():
            right = np.abs(generator.normal(0, 0.15, n_questions) + shift + skill - 0.5) * np.sign(skill - 0.5 + shift)
            scores = (right > 0).astype(float) if benchmark != "textvqa" else _soft(skill + shift, generator)
            flips = generator.random(n_questions) < 0.08
            scores = np.where(flips, np.round(1 - scores, 1), scores)
            text = "".join(f'{head}, "score": {score}}}\n' for head, score in zip(heads, scores.tolist(), strict=True))
            (place / "predictions" / f"{benchmark}.jsonl").write_text(text, encoding="utf-8")
            metrics[f"{benchmark}/accuracy"] = float(scores.mean())
            keys[benchmark] = {"split": "val", "prompt_hash": "0", "n": n_questions, "metric_version": "1"}
        result = {"status": "completed", "metrics": metrics, "eval_keys": keys, "run_id": str(number)}
        (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
        trials.append({"number": number, "params": {"adapter": f"lora_{number:03d}"}, "run_dir": str(number)})
    (folder / "sweep.json").write_text(json.dumps({"name": "large", "trials": trials}), encoding="utf-8")
    return folder


def _soft(skill: np.ndarray[Any, Any], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    agreeing = np.clip(np.floor((skill + generator.normal(0, 0.1, len(skill))) * 5), 0, 4).astype(int)
    return np.array([0.0, 0.3, 0.6, 0.9, 1.0])[agreeing]


def _question(benchmark: str, number: int, per_image: int) -> str:
    """A line of predictions up to its score, as long as real ones are."""
    row = {
        "question_id": 100_000 + number,
        "image_id": f"{benchmark}_{number // per_image:06d}",
        "question": f"what is written on the sign number {number} in the middle of the picture?",
        "question_type": ("read", "count", "colour", "where")[number % 4],
        "prompt_hash": f"{number:016x}",
        "prediction": "parking",
        "answers": ["parking", "parking", "no parking", "parking", "park"] * 2,
        "model_fingerprint": "0" * 64,
    }
    return json.dumps(row)[:-1]


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measured(sweep: Path, out: Path) -> tuple[float, float]:
    """Seconds and MiB of the verb."""
    command = [sys.executable, "-m", "benchmarks.compare_runs", str(sweep), str(out)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return seconds, float(done.stdout.splitlines()[-1])


def _report(sweep: str, out: str) -> float:
    """Runs the verb here; MiB of this process and of the largest that it started, once for each core."""
    from mgm_exp.cli import main

    code = main(["report", sweep, "--out", out])
    if code:
        sys.exit(code)
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + n_cores * largest_child) / 1024


if __name__ == "__main__":
    print(_report(sys.argv[1], sys.argv[2]))
