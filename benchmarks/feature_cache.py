"""Features of frozen towers, kept or computed: a training step with each tier, and an evaluation.

The step is the trainer's own, data included: read or decode 8 images, towers where they run, mining, projector, LLM,
backward, update; the LoRA of rank 8 and the connector train (for ``tokens`` the LoRA alone, on both sides). The peer is
the same step without a cache: photo-sized JPEG files, decoded, padded, resized and seen in every step. The shipped
tiny model in fp32, one thread, CPU time of the process, repeats alternated. Losses of both sides are compared bit for
bit, and predictions byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

N, STEPS, REPEATS = 32, 4, 3
N_QUICK, STEPS_QUICK, REPEATS_QUICK = 8, 1, 1
MICRO_BATCH = 8
PHOTO = (640, 480)
GOAL = 1.3


def run(work: Path, quick: bool = False) -> list[Row]:
    """A row for each tier, and one for evaluation."""
    import torch

    torch.set_num_threads(1)
    n, steps, repeats = (N_QUICK, STEPS_QUICK, REPEATS_QUICK) if quick else (N, STEPS, REPEATS)
    make_photos(work, n)
    rows = [
        _step(work, tier, steps, repeats, None if quick or tier in ("resized", "clip") else GOAL)
        for tier in ("towers", "clip", "tokens", "resized")
    ]
    return [*rows, _evaluation(work, repeats)]


def make_photos(work: Path, n: int) -> None:
    """Demo scenes as JPEG files of a camera's proportions, and rows and questions about them."""
    from PIL import Image

    from mgm_exp.data.demo import write_demo

    write_demo(work / "demo", n_train=0, n_val=0, n_test=n, workers=1)
    (work / "images").mkdir()
    rows, asked = [], []
    for k, path in enumerate(sorted((work / "demo" / "images").glob("*.png"))[:n]):
        Image.open(path).convert("RGB").resize(PHOTO, Image.Resampling.BICUBIC).save(work / "images" / f"{k}.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat does it read?"}, {"from": "gpt", "value": f"number {k}"}]
        rows.append({"id": str(k), "image": f"{k}.jpg", "conversations": turns})
        asked.append({"question_id": str(k), "image": f"{k}.jpg", "question": "What does it read?", "answer": "red"})
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (work / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")


def _config(work: Path, *overrides: str) -> Any:
    from mgm_exp.compose import compose

    return compose(
        [
            "device=cpu",
            "adapter=lora_r8",
            "train.cache_visual_tokens=false",
            "train.freeze_connector=false",
            f"train.micro_batch_size={MICRO_BATCH}",
            f"train.global_batch_size={MICRO_BATCH}",
            "train.max_steps=1000",
            f"paths.root={work / 'outputs'}",
            *overrides,
        ]
    )


def _step(work: Path, tier: str, steps: int, repeats: int, goal: float | None) -> Row:
    frozen = ["train.freeze_connector=true"] if tier == "tokens" else []
    asked = "train.resized_cache_gb=1" if tier == "resized" else f"train.feature_cache={tier}"
    heard: list[str] = []
    began = time.process_time()
    training(work, [*frozen, asked], heard.append)  # makes what the measured one finds
    made_s = time.process_time() - began
    began = time.process_time()
    sides = {
        "ours": training(work, [*frozen, asked], heard.append),
        "peer": training(work, frozen, heard.append),
    }
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for side in sides.values():
        next(side)  # the first step allocates
    for repeat in range(repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            began = time.process_time()
            for _ in range(steps):
                losses.setdefault(name, []).append(next(sides[name]))
            seconds[name].append((time.process_time() - began) / steps)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["peer"], strict=True)]
    mine, theirs = (statistics.median(seconds[name]) for name in ("ours", "peer"))
    is_equal = losses["ours"] == losses["peer"]
    size = _bytes_an_image(work, "resized_images" if tier == "resized" else "image_features")
    what = "decoded and resized images" if tier == "resized" else f"train.feature_cache={tier}"
    return Row(
        f"a training step with {what}",
        "s",
        mine,
        theirs,
        goal,
        f"bit-equal: {len(losses['ours'])} losses" if is_equal else "losses DIFFER",
        f"micro-batch {MICRO_BATCH}, LoRA of rank 8{'' if frozen else ' and the connector'} trained; {size:,.0f} bytes "
        f"an image; ratios {', '.join(f'{ratio:.2f}' for ratio in ratios)}; start and pass {made_s:.1f} s",
    )


def training(work: Path, overrides: list[str], say: Callable[[str], None]) -> Iterator[float]:
    """The losses of a stage's steps, one at a time; everything before the first is done when this returns."""
    from mgm_exp.config import Device, plain
    from mgm_exp.train.assemble import assemble
    from mgm_exp.train.job import TrainJob
    from mgm_exp.train.ranks import Ranks
    from mgm_exp.train.step import alone, take_step

    job = TrainJob(
        stage="instruct",
        config=plain(_config(work, *overrides)),
        records=work / "rows.jsonl",
        image_root=work / "images",
        connector=None,
        visual_tokens=None,
        work=work / "work",
    )
    ranks = Ranks.alone(Device.cpu)
    stage = assemble(job, ranks, say)

    def steps() -> Iterator[float]:
        for number, micro_batches in enumerate(stage.steps_from(0)):
            launched = alone(take_step(stage.engine, stage.settings, ranks, micro_batches, number, 1.0))
            yield launched.outcome().loss

    return steps()


def _bytes_an_image(work: Path, stage: str) -> float:
    """Of the tier that was made last."""
    from mgm_exp.store import Store

    newest = max(
        (entry for entry in Store(work / "outputs" / "store").entries() if entry.stage == stage),
        key=lambda entry: entry.path.stat().st_ctime_ns,
    )
    return float(newest.meta["bytes"] / newest.meta["images"])


def _evaluation(work: Path, repeats: int) -> Row:
    """What the second trial's evaluation takes."""
    from mgm_exp.evaluate import Candidate, Examiner
    from mgm_exp.evaluate.benchmarks import Custom, Settings

    config = _config(work)
    section = dataclasses.replace(
        config.eval.custom, questions=str(work / "questions.jsonl"), images=str(work / "images"), instruction=None
    )
    benchmark = Custom.configured("custom", section, Settings(16, 12), work / "cache")
    n = len(benchmark.questions)

    def answers(out: Path, *overrides: str) -> tuple[float, bytes]:
        with Examiner(_config(work, *overrides), "cpu") as examiner:
            few = benchmark.with_settings(max_questions=1)
            examiner.examine(few, {Candidate("few", out / "few"): None})  # loads the model
            began = time.process_time()
            examiner.examine(benchmark, {Candidate("all", out / "all"): None})
            return time.process_time() - began, (out / "all" / "predictions.jsonl").read_bytes()

    answers(work / "made", "train.feature_cache=towers")
    sides = {"ours": ("train.feature_cache=towers",), "peer": ()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, bytes] = {}
    for repeat in range(repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            taken, said[name] = answers(work / f"{name}-{repeat}", *sides[name])
            seconds[name].append(taken)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["peer"], strict=True)]
    mine, theirs = (statistics.median(seconds[name]) for name in ("ours", "peer"))
    return Row(
        "evaluation of a second trial with train.feature_cache=towers",
        "s",
        mine,
        theirs,
        None,
        f"{n} of {n} predictions equal byte for byte" if said["ours"] == said["peer"] else "predictions DIFFER",
        f"{n} questions about as many images, up to 12 tokens, model loaded; ratios "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}",
    )
