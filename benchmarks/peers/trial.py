"""One LoRA trial as a user of transformers and PEFT prepares it: model, rows, collator, and a clock beside it.

Images are decoded, resized and encoded in every step, and the loss is over the logits of all positions, as the model's
``forward`` gives it. Rows are padded to the longest of their batch, as the official collator does. So that results can
be compared, a trial is told the order of its rows, the first values of A and the seeds of dropout; that costs nothing
that can be measured. The model is used as any model of transformers, with its processor: nothing of this project's
training is.

``TRIAL.json``: ``model, rows, images`` (paths), ``rank, alpha, dropout, lr, warmup_steps, beta2, batch, max_length``,
``order`` (the rows of each step), ``dropout_seeds`` (one a step), ``adapter_seed``, ``out``; optional ``asked`` (the
questions that score it in the end), ``label_head`` (the loss at supervised positions only), ``rungs`` (steps at which
it is scored and the parent is asked), ``engine``.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import above_now, peak_reset

TARGETS = r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
# Questions in one call of ``generate``: the Trainer's own default.
ASKED_AT_ONCE = 8


def prepared(trial: dict[str, Any]) -> tuple[Any, Rows]:
    """The model with PEFT's layers, and the data."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mgm_exp.model import load_model, load_processor
    from mgm_exp.model.adapters.base import by_official_name, start

    torch.set_num_threads(1)
    processor = load_processor(trial["model"], trial["max_length"])
    model = load_model(trial["model"], dtype="float32")
    model.requires_grad_(False)
    config = LoraConfig(
        r=trial["rank"],
        lora_alpha=trial["alpha"],
        lora_dropout=trial["dropout"],
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    # A begins with the values that our trial of this seed has; PEFT's own are of the same distribution
    lora = {name: p for name, p in by_official_name(model).items() if ".lora_" in name}
    start(lora, ["lora_B.weight"], trial["adapter_seed"])
    rows = json.loads(Path(trial["rows"]).read_text(encoding="utf-8"))
    return adapted, Rows(rows, Path(trial["images"]), processor)


class Rows:
    """Decodes, resizes and tokenizes a row whenever it is asked for."""

    def __init__(self, rows: list[dict[str, Any]], images: Path, processor: Any) -> None:
        self.rows, self.images, self.processor = rows, images, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        import torch
        from PIL import Image

        row = self.rows[number]
        encoded = self.processor.encode(row["conversations"], has_image=True)
        with Image.open(self.images / row["image"]) as image:
            low, high = self.processor.pixels(image.convert("RGB"), aspect="pad")
        ids, labels = (torch.tensor(encoded[key]) for key in ("input_ids", "labels"))
        return {"input_ids": ids, "labels": labels, "images": low, "images_aux": high}


def accuracy(model: Any, data: Rows, trial: dict[str, Any]) -> float:
    """Share of the held-out questions that are answered rightly, greedily, some at a time."""
    import torch
    from PIL import Image

    from mgm_exp.evaluate.metrics import exact_match

    processor, inner = data.processor, model.base_model.model
    asked = [json.loads(line) for line in Path(trial["asked"]).read_text(encoding="utf-8").splitlines()]
    right = 0.0
    was_training = inner.training
    inner.eval()
    for start in range(0, len(asked), ASKED_AT_ONCE):
        some = asked[start : start + ASKED_AT_ONCE]
        pairs = [processor.pixels(Image.open(data.images / line["image"]), "pad") for line in some]
        ids = [torch.tensor(processor.encode_prompt(line["question"])) for line in some]
        rows = [
            {"input_ids": i, "labels": i, "images": a, "images_aux": b} for i, (a, b) in zip(ids, pairs, strict=True)
        ]
        batch = padded(rows, processor.pad_token_id)
        del batch["labels"]
        with torch.inference_mode():
            said = inner.generate(**batch, max_new_tokens=2, eos_token_id=processor.stop_token_ids)
        answers = [processor.decode(row) for row in said]
        right += sum(exact_match(answer, [line["answer"]]) for answer, line in zip(answers, some, strict=True))
    inner.train(was_training)
    return right / len(asked)


def padded(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """The official collator: rows are padded to the longest of their batch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.arange(ids.shape[1])[None] < lengths[:, None],
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        "images": torch.stack([row["images"] for row in rows]),
        "images_aux": torch.stack([row["images_aux"] for row in rows]),
    }


class Clock:
    """CPU seconds of every step (the loading of its rows included), losses, and memory above the loaded process.

    Args:
        began: CPU seconds of the process when its own work began.
    """

    def __init__(self, trial: dict[str, Any], began: float, model: Any, data: Rows) -> None:
        self.trial, self.began, self.model, self.data = trial, began, model, data
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.is_pruned = False

    def start(self) -> None:
        """Everything is loaded."""
        self.base = peak_reset()
        self.loaded = self.last = time.process_time()

    def step_begins(self, step: int) -> None:
        """Dropout's generator for this step."""
        import torch

        torch.manual_seed(self.trial["dropout_seeds"][step])

    def step_ends(self) -> None:
        now = time.process_time()
        self.seconds.append(now - self.last)
        self.last = now

    def is_stopped(self, step: int) -> bool:
        """At a rung: tells the parent, which holds the study, and waits for its word."""
        if step not in self.trial.get("rungs", ()):
            return False
        print(json.dumps({"step": step, "value": accuracy(self.model, self.data, self.trial)}), flush=True)
        self.is_pruned = sys.stdin.readline().strip() == "stop"
        self.last = time.process_time()
        return self.is_pruned

    def finish(self, result: Path) -> None:
        """Saves the adapter, scores the trial where that is asked for, and writes what was seen."""
        above = above_now(self.base)
        self.model.save_pretrained(self.trial["out"])
        is_scored = "asked" in self.trial and not self.is_pruned
        score = accuracy(self.model, self.data, self.trial) if is_scored else None
        usage = resource.getrusage(resource.RUSAGE_SELF)
        found = {
            "losses": self.losses,
            "score": score,
            "step_s": self.seconds,
            "loaded_s": self.loaded - self.began,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "base_mib": self.base,
            "above_mib": above,
        }
        result.write_text(json.dumps(found), encoding="utf-8")
