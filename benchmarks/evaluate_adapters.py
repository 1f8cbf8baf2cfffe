"""Several adapters of one base: ``mgm-exp evaluate RUN1 ... RUNK`` against K calls with one run each.

Processes as a user starts them, with their imports and the loading of the model; and the same without all that, in one
process with the models loaded. The runs were not trained: their LoRA layers and connectors are drawn at random, which
takes the same time. CPU time, median of alternated repeats; every answer of the one pass is compared with that of the
separate calls.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.evaluate_throughput import cpu_timed
from benchmarks.measurement import Row

K, N, N_QUICK = 4, 32, 8
REPEATS, REPEATS_QUICK = 1, 1


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures with processes and without."""
    import torch

    from mgm_exp.data.demo import write_demo

    torch.set_num_threads(1)
    n, repeats = (N_QUICK, REPEATS_QUICK) if quick else (N, REPEATS)
    write_demo(work / "demo", n_train=0, n_val=0, n_test=n, workers=1)
    asked = json.loads((work / "demo" / "test.json").read_text(encoding="utf-8"))["data"]
    lines = [
        {
            "question_id": row["question_id"],
            "image": f"{row['image_id']}.png",
            "question": row["question"],
            "answer": "red",
        }
        for row in asked
    ]
    (work / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    runs = [_made_up_run(work / "runs" / f"lora{k}" / "1", k) for k in range(K)]
    return [_with_processes(work, runs, n, repeats), _without(work, runs, n, repeats)]


def _settings(work: Path) -> list[str]:
    given = {"questions": work / "asked.jsonl", "images": work / "demo" / "images", "max_new_tokens": 12}
    return [f"eval.custom.{key}={value}" for key, value in given.items()]


def _made_up_run(folder: Path, number: int) -> Path:
    """A run's folder with what an evaluation needs of it."""
    import torch
    import yaml

    from mgm_exp.compose import compose
    from mgm_exp.config import plain
    from mgm_exp.model import apply_adapter, load_model, save_adapter
    from mgm_exp.model.folders import TINY
    from mgm_exp.model.trainable import connector_names

    config = compose(["adapter=lora_r8", "device=cpu"])
    model = load_model(TINY, dtype="float32")
    apply_adapter(model, config.adapter, seed=number)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or name in connector_names():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder / "adapter")
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)), encoding="utf-8")
    return folder


def _with_processes(work: Path, runs: list[Path], n: int, repeats: int) -> Row:
    def call(asked: list[Path]) -> None:
        command = [sys.executable, "-m", "mgm_exp.cli", "evaluate", *map(str, asked), "--benchmarks", "custom"]
        subprocess.run([*command, *_settings(work), f"paths.root={work / 'root'}"], check=True, capture_output=True)

    def fresh(calls: list[list[Path]]) -> tuple[float, list[str]]:
        shutil.rmtree(work / "root", ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for asked in calls:
            call(asked)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = [(folder / "predictions" / "custom.jsonl").read_text(encoding="utf-8") for folder in runs]
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, said

    return _row(
        f"evaluation of {K} adapters: one call, and {K} calls",
        "processes with start, imports and loading",
        lambda: fresh([runs]),
        lambda: fresh([[folder] for folder in runs]),
        n,
        repeats,
    )


def _without(work: Path, runs: list[Path], n: int, repeats: int) -> Row:
    from mgm_exp.compose import compose
    from mgm_exp.evaluate import Candidate, Examiner, load_benchmark

    config = compose(["adapter=lora_r8", "device=cpu", "eval=custom", *_settings(work)])
    benchmark = load_benchmark("custom", config)
    out = work / "out"
    with Examiner(config, "cpu") as examiner:

        def answered(passes: list[list[Path]]) -> tuple[float, list[str]]:
            shutil.rmtree(out, ignore_errors=True)

            def work_through() -> list[str]:
                for folders in passes:
                    examiner.examine(benchmark, {Candidate(f.parent.name, out / f.parent.name): f for f in folders})
                return [(out / f.parent.name / "predictions.jsonl").read_text(encoding="utf-8") for f in runs]

            return cpu_timed(work_through)

        answered([runs])  # loads the models
        return _row(
            f"answers of {K} adapters: one pass, and {K} passes",
            "one process, models loaded",
            lambda: answered([runs]),
            lambda: answered([[folder] for folder in runs]),
            n,
            repeats,
        )


def _row(
    name: str,
    how: str,
    ours: Callable[[], tuple[float, list[str]]],
    peer: Callable[[], tuple[float, list[str]]],
    n: int,
    repeats: int,
) -> Row:
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    said: dict[str, Any] = {}
    sides = [("ours", ours), ("peer", peer)]
    for repeat in range(repeats):
        for side, measured in sides if repeat % 2 == 0 else reversed(sides):
            taken, said[side] = measured()
            seconds[side].append(taken)
    same = said["ours"] == said["peer"]
    return Row(
        name,
        "s",
        statistics.median(seconds["ours"]),
        statistics.median(seconds["peer"]),
        None,
        f"predictions of all {K} runs are {'equal byte for byte' if same else 'DIFFER'}",
        f"{n} questions, {K} LoRA r=8 with connectors of their own on the shipped tiny model, fp32, CPU time of {how}, "
        f"one thread, median of {repeats} alternated repeats",
    )
