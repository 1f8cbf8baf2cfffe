"""Eight LoRA trials in one process with nothing around them: what no way of running them could save here.

    python -m benchmarks.peers.floor TRIALS.json RESULT.json

Asks Optuna for the points and has Hydra compose a configuration for each, which is what makes a sweep of it. Imports
torch and transformers, loads the model once, encodes every image that is needed once, tokenises every row once, trains
with PyTorch's fused AdamW and our fastest kernels (LoRA layers as one operation, no padding, the loss's gradient with
the loss), asks the held-out questions of merged weights, 16 at a time, and writes each adapter as PEFT does. No
records, no checkpoints, no checks: nobody could resume it, and nobody could tell afterwards what it did. Rows, their
order, first values and dropout masks are those of the other peers, so that losses can be compared.

``TRIALS.json``: ``trials`` (as :mod:`benchmarks.peers.trial` takes them), ``overrides`` (of each), ``asked``, ``rungs``
(steps at which the better half goes on; then only the last trial ends), ``out`` (a folder).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from mgm_exp.bootstrap import PARENT
from mgm_exp.store import die_with_parent

SEEN_AT_ONCE, ASKED_AT_ONCE = 8, 16


def main(trials_file: str, result_file: str) -> None:
    """Trains and scores all trials."""
    began = time.process_time()
    told: dict[str, Any] = json.loads(Path(trials_file).read_text(encoding="utf-8"))
    compose(told["trials"], told["overrides"])
    floor = Floor(told)
    loaded = time.process_time()
    floor.see()
    seen = time.process_time()
    trials = [Trial(floor, one) for one in told["trials"]]
    steps = len(told["trials"][0]["order"])
    alive = list(range(len(trials)))
    scores: list[float | None] = [None] * len(trials)
    asking = 0.0
    for until in [*told["rungs"], steps]:
        for number in alive:
            trials[number].train(until)
        asked = time.process_time()
        found = {number: trials[number].score() for number in alive}
        asking += time.process_time() - asked
        if until == steps:
            scores = [found.get(number) for number in range(len(trials))]
        else:
            alive = sorted(sorted(alive, key=lambda number: -found[number])[: max(1, len(alive) // 2)])
    for number, trial in enumerate(trials):
        trial.save(Path(told["out"]) / str(number))
    ended = time.process_time()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "loaded_s": loaded - began,
        "seen_s": seen - loaded,
        "step_s": ended - seen - asking,
        "asked_s": asking,
        "losses": [trial.losses for trial in trials],
        "scores": scores,
    }
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


def compose(trials: list[dict[str, Any]], overrides: list[list[str]]) -> None:
    """A study with these points, and the configuration of each: the least that a sweep by Hydra and Optuna does."""
    import optuna

    from mgm_exp.compose import compose_tree, session

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    with session() as hydra:
        for trial, given in zip(trials, overrides, strict=True):
            study.enqueue_trial({key: trial[key] for key in ("rank", "lr", "dropout")})
            asked = study.ask()
            asked.suggest_categorical("rank", sorted({one["rank"] for one in trials}))
            asked.suggest_float("lr", 1e-5, 1e-1, log=True)
            asked.suggest_float("dropout", 0.0, 0.2)
            compose_tree(hydra, given)


class Floor:
    """What all trials share: the model, what it sees in each image, and tokens."""

    def __init__(self, told: dict[str, Any]) -> None:
        import torch

        from mgm_exp.model import load_model, load_processor
        from mgm_exp.model.execution import Execution, blocks_of, run_as
        from mgm_exp.model.last_block import LastBlock
        from mgm_exp.model.low_rank_product import InputDropout

        torch.set_num_threads(1)
        first = told["trials"][0]
        self.images = Path(first["images"])
        self.processor = load_processor(first["model"], first["max_length"])
        self.model = load_model(first["model"], dtype="float32")
        self.model.requires_grad_(False)
        run_as(self.model, Execution(loss_kernel="fused", block_kernel="fused", padding_free=True))
        self.model.lora_dropout = InputDropout()
        self.model.last_block = LastBlock(blocks_of(self.model)[-1], self.model.lora_dropout)
        self.layers: dict[str, Any] = {
            name: layer
            for name, layer in self.model.named_modules()
            if name.startswith("model.layers.") and isinstance(layer, torch.nn.Linear)
        }
        self.order: list[list[int]] = first["order"]
        rows = json.loads(Path(first["rows"]).read_text(encoding="utf-8"))
        self.rows = [(row["image"], self.processor.encode(row["conversations"])) for row in rows]
        self.asked = [json.loads(line) for line in Path(told["asked"]).read_text(encoding="utf-8").splitlines()]
        self.seen: dict[str, Any] = {}

    def see(self) -> None:
        """Every image that a step reads or that is asked about, once."""
        import torch
        from PIL import Image

        read = [self.rows[row][0] for step in self.order for row in step]
        names = list(dict.fromkeys(read + [line["image"] for line in self.asked]))
        for start in range(0, len(names), SEEN_AT_ONCE):
            some = names[start : start + SEEN_AT_ONCE]
            pixels = [self.processor.pixels(Image.open(self.images / name), "pad") for name in some]
            low, high = (torch.stack(side) for side in zip(*pixels, strict=True))
            with torch.no_grad():
                self.seen |= dict(zip(some, self.model.model.encode_images(low, high), strict=True))

    def batch(self, rows: list[int]) -> dict[str, Any]:
        """What the model's loss takes."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        encoded = [self.rows[row][1] for row in rows]
        ids, labels = ([torch.tensor(one[key]) for one in encoded] for key in ("input_ids", "labels"))
        padded = pad_sequence(ids, batch_first=True, padding_value=self.processor.pad_token_id)
        lengths = torch.tensor([len(one) for one in ids])
        return {
            "input_ids": padded,
            "attention_mask": torch.arange(padded.shape[1])[None] < lengths[:, None],
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "visual_tokens": torch.stack([self.seen[self.rows[row][0]] for row in rows]),
        }


class Trial:
    """One trial: its factors, its optimizer, and how far it is."""

    def __init__(self, floor: Floor, trial: dict[str, Any]) -> None:
        import torch
        from transformers import get_cosine_schedule_with_warmup

        from mgm_exp.model.adapters.base import start

        self.floor, self.trial, self.losses = floor, trial, list[float]()
        rank = trial["rank"]
        self.factors: dict[str, tuple[Any, Any]] = {
            name: (
                torch.nn.Parameter(torch.empty(rank, layer.in_features)),
                torch.nn.Parameter(torch.empty(layer.out_features, rank)),
            )
            for name, layer in floor.layers.items()
        }
        named = {f"{name}.lora_A.weight": down for name, (down, _) in self.factors.items()}
        named |= {f"{name}.lora_B.weight": up for name, (_, up) in self.factors.items()}
        start(named, ["lora_B.weight"], trial["adapter_seed"])
        self.trained = list(named.values())
        betas = (0.9, trial["beta2"])
        self.optimizer = torch.optim.AdamW(self.trained, lr=trial["lr"], betas=betas, weight_decay=0.0, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, trial["warmup_steps"], len(trial["order"]))
        self.order: list[list[int]] = trial["order"]

    def train(self, until: int) -> None:
        """Goes on up to this step."""
        import torch

        model = self._adapted()
        model.train()
        for number in range(len(self.losses), until):
            torch.manual_seed(self.trial["dropout_seeds"][number])
            loss = model.loss(self.floor.batch(self.order[number]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.losses.append(float(loss))

    def score(self) -> float:
        """Share of the held-out questions that are answered rightly."""
        import torch

        from mgm_exp.evaluate.generate import answer_batch
        from mgm_exp.evaluate.metrics import exact_match

        model, floor, right = self._merged(), self.floor, 0.0
        model.eval()
        for begin in range(0, len(floor.asked), ASKED_AT_ONCE):
            some = floor.asked[begin : begin + ASKED_AT_ONCE]
            prompts = [floor.processor.encode_prompt(line["question"]) for line in some]
            seen = torch.stack([floor.seen[line["image"]] for line in some])
            said = answer_batch(model, floor.processor, prompts, seen, 2)
            right += sum(exact_match(answer, [line["answer"]]) for answer, line in zip(said, some, strict=True))
        return right / len(floor.asked)

    def save(self, folder: Path) -> None:
        """The adapter, as PEFT's files."""
        from peft import LoraConfig
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        targets = sorted({name.rpartition(".")[2] for name in self.factors})
        of = self.trial
        LoraConfig(
            r=of["rank"],
            lora_alpha=of["alpha"],
            lora_dropout=of["dropout"],
            target_modules=targets,
            task_type="CAUSAL_LM",
        ).save_pretrained(folder)
        tensors = {}
        for name, factors in self.factors.items():
            for which, factor in zip("AB", factors, strict=True):
                tensors[f"base_model.model.{name}.lora_{which}.weight"] = factor.detach()
        save_file(tensors, folder / "adapter_model.safetensors")

    def _merged(self) -> Any:
        """The model, with the factors of this trial added to its weights."""
        import torch

        scale = self.trial["alpha"] / self.trial["rank"]
        with torch.no_grad():
            for name, layer in self.floor.layers.items():
                down, up = self.factors[name]
                weight = torch.addmm(layer.weight, up, down, alpha=scale)
                layer.forward = partial(torch.nn.functional.linear, weight=weight, bias=layer.bias)
        return self.floor.model

    def _adapted(self) -> Any:
        """The model, with the factors of this trial in place of the last one's."""
        from mgm_exp.model.low_rank_product import product

        scale, rate = self.trial["alpha"] / self.trial["rank"], self.trial["dropout"]
        model = self.floor.model
        for name, layer in self.floor.layers.items():
            down, up = self.factors[name]

            def forward(x: Any, layer: Any = layer, down: Any = down, up: Any = up) -> Any:
                dropped = model.lora_dropout(x, rate) if rate and model.training else None
                return product(x, dropped, layer.weight, layer.bias, down, up, scale)

            layer.forward = forward
        return model


if __name__ == "__main__":
    die_with_parent(parent_pid=int(os.environ[PARENT]))
    main(*sys.argv[1:])
