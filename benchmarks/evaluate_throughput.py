"""Evaluation: our batches against one question at a time, as the official scripts ask (``model_vqa_loader.py``).

The same model, processor and questions on both sides. The peer opens and encodes the image of each question, builds the
prompt, calls transformers' ``generate`` with its KV cache (greedy, one beam), and writes a line; ours is the whole of
``evaluate`` at batch 16 with its files, its partial file and the scores, which the peer does not compute. CPU time of
the process; the repeat with the median ratio, of alternated ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

N, N_QUICK = 64, 16
REPEATS, REPEATS_QUICK = 3, 1
BATCH = 16
GOAL = 4.0
# max_new_tokens of the official TextVQA script: the shipped base ends its turn by itself.
OFFICIAL = 128


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures the demo questions, short answers, and several questions about each image."""
    import torch

    from mgm_exp.data.demo import write_demo
    from mgm_exp.evaluate.benchmarks import Custom, Demo, Settings
    from mgm_exp.model import load_model, load_processor
    from mgm_exp.model.folders import TINY

    torch.set_num_threads(1)
    n, repeats = (N_QUICK, REPEATS_QUICK) if quick else (N, REPEATS)
    write_demo(work / "demo", n_train=0, n_val=0, n_test=n, workers=1)
    model, processor = load_model(TINY, dtype="float32"), load_processor(TINY)
    whole = Demo(work / "demo", "test", Settings(BATCH, OFFICIAL))
    images = [question.image for question in whole.questions]
    lines = [
        {"question_id": 4 * k + j, "image": images[4 * (k // 4) + j], "question": question.question, "answer": "red"}
        for k, question in enumerate(whole.questions[: n // 4])
        for j in range(4)
    ]
    (work / "shared.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    shared = Custom.configured("custom", _section(work), Settings(BATCH, 12), work / "cache")
    found = []
    for benchmark, what, goal in (
        (whole, f"the demo's questions, up to {OFFICIAL} tokens as in the official script", GOAL),
        (whole.with_settings(max_new_tokens=12), "the same, up to 12 tokens", None),
        (whole.with_settings(max_new_tokens=3), "the same, up to 3 tokens", None),
        (shared, "four questions an image, up to 12 tokens", None),
    ):
        found.append(_compared(model, processor, benchmark, what, goal, work / "out", repeats))
    return found


def _section(work: Path) -> Any:
    from mgm_exp.config import CustomConfig

    return CustomConfig(questions=str(work / "shared.jsonl"), images=str(work / "demo"), instruction=None)


def _compared(
    model: Any, processor: Any, benchmark: Any, what: str, goal: float | None, out: Path, repeats: int
) -> Row:
    from mgm_exp.evaluate import evaluate

    n = len(benchmark.questions)

    def ours() -> list[str]:
        evaluate(model, processor, benchmark, out / "ours", model_fingerprint="bench")
        rows = (out / "ours" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["prediction"] for row in rows]

    def peer() -> list[str]:
        return one_at_a_time(model, processor, benchmark, out / "answers.jsonl")

    few = benchmark.with_settings(max_questions=BATCH)
    evaluate(model, processor, few, out / "warm", model_fingerprint="bench")
    one_at_a_time(model, processor, few.with_settings(max_questions=2), out / "answers.jsonl")
    ours_s: list[float] = []
    peer_s: list[float] = []
    equal = 0
    for repeat in range(repeats):
        sides = [(ours, ours_s), (peer, peer_s)]
        said = []
        for side, seconds in sides if repeat % 2 == 0 else reversed(sides):
            taken, answers = cpu_timed(side)
            seconds.append(taken)
            said.append(answers)
        equal = sum(a == b for a, b in zip(*said, strict=True))
    pairs = sorted(zip(ours_s, peer_s, strict=True), key=lambda pair: pair[1] / pair[0])
    mine, theirs = pairs[len(pairs) // 2]
    ratios = [theirs / mine for mine, theirs in pairs]
    return Row(
        f"evaluation at batch {BATCH}: {what}",
        "s",
        mine,
        theirs,
        goal,
        f"{equal} of {n} answers equal" if equal == n else f"answers DIFFER: {equal} of {n} equal",
        f"{n} questions, the shipped tiny model in fp32 on the CPU, one thread, CPU time, the repeat with the median "
        f"ratio of {repeats} alternated ones ({ratios[0]:.1f} to {ratios[-1]:.1f}); evaluate() with files and scores "
        f"({n / mine:.1f}/s), one question at a time ({n / theirs:.1f}/s)",
    )


def one_at_a_time(model: Any, processor: Any, benchmark: Any, answers: Path) -> list[str]:
    """The official loop: every question on its own, its image encoded with it."""
    import torch

    found = []
    with answers.open("w", encoding="utf-8") as file:
        for question in benchmark.questions:
            ids = torch.tensor([processor.encode_prompt(question.prompt)])
            low, high = processor.pixels(benchmark.picture(question.image), "pad")
            with torch.inference_mode():
                said = model.generate(
                    ids,
                    images=low[None],
                    images_aux=high[None],
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=benchmark.settings.max_new_tokens,
                    eos_token_id=processor.stop_token_ids,
                    use_cache=True,
                )
            found.append(processor.decode(said[0]))
            line = {"question_id": question.question_id, "prompt": question.prompt, "text": found[-1]}
            file.write(json.dumps(line) + "\n")
            file.flush()
    return found


def cpu_timed(work: Callable[[], list[str]]) -> tuple[float, list[str]]:
    """CPU seconds of this process for a call, and what it gave."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result
