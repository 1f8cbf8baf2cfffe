"""One real run, as small as a run can be: two steps of align, three of instruct, three questions of its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

# Would run wherever a page does not escape what data says. Every text of the run's data begins with it.
HOSTILE = "</script><script>PWNED()</script><img src=x onerror=PWNED()>\"'<b onmouseover=PWNED()>"
# Keys in the environment; they must be nowhere in what a run leaves. Wandb wants forty characters of its own.
KEYS = {
    "WANDB_API_KEY": "canarywandb0123456789abcdef0123456789abcdef",
    "HF_TOKEN": "hf_canaryHuggingFace0123456789",
    "OPENAI_API_KEY": "sk-canaryOpenAI0123456789abcdef",
    "MGM_EXP_JUDGE_KEY": "canary-judge-0123456789",
    "ALERT_WEBHOOK_SECRET": "canary-webhook-0123456789",
}
N_ROWS, BATCH = 12, 4


@dataclass(frozen=True)
class RecordedRun:
    """Where it lies, and what it was made of."""

    folder: Path
    root: Path
    data: Path
    overrides: tuple[str, ...]


def write_data(folder: Path, text: str = HOSTILE) -> None:
    """Captions, conversations and questions about a few pictures."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")

    def rows(kind: str) -> str:
        found = []
        for number in range(N_ROWS):
            turns = [
                {"from": "human", "value": f"<image>\nwhat is {number}?" if kind == "instruct" else "<image>\n"},
                {"from": "gpt", "value": f"{text} {number}"},
            ]
            found.append({"id": f"{kind}-{number}", "image": f"{number % 3}.png", "conversations": turns})
        return "".join(json.dumps(row) + "\n" for row in found)

    (folder / "align.jsonl").write_text(rows("align"))
    (folder / "instruct.jsonl").write_text(rows("instruct"))
    questions = [
        {"question_id": n, "image": f"{n}.png", "question": f"{text} {n}?", "answer": text, "type": text}
        for n in range(3)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def overrides_for(folder: Path, root: Path) -> tuple[str, ...]:
    steps = ("max_steps=2", f"global_batch_size={BATCH}", f"micro_batch_size={BATCH}")
    return (
        "name=recorded", "device=cpu", f"paths.root={root}", "tracker.mode=offline", "eval=custom",
        f"data.path={folder}/align.jsonl", f"data.image_root={folder}/images",
        f"data.instruct.path={folder}/instruct.jsonl", f"data.instruct.image_root={folder}/images",
        f"eval.custom.questions={folder}/questions.jsonl", f"eval.custom.images={folder}/images",
        "eval.custom.max_new_tokens=4",
        *(f"train.align.{step}" for step in steps),
        *(f"train.{step}" for step in steps[1:]), "train.max_steps=3", "train.checkpoint.every_steps=2",
    )  # fmt: skip


def train_a_little(folder: Path) -> RecordedRun:
    """Trains and evaluates for real, in this process."""
    from mgm_exp.command import run

    data, root = folder / "data", folder / "outputs"
    write_data(data)
    given = overrides_for(data, root)
    # A key on the command line of another tool, and an address with a password, as shells have them.
    environment = {**KEYS, "HTTPS_PROXY_PASSWORD": "canary-proxy-0123456789"}
    with mock.patch.dict(os.environ, environment):
        run(given)
    (found,) = (root / "runs" / "recorded").iterdir()
    return RecordedRun(found, root, data, given)
