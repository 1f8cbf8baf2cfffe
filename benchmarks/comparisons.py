"""Rows with a goal: a part or a step of ours beside what a user would do instead, in one process, alternated."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ladder import GIB, WARM_UP, Rung, Shapes, Steps, let_go, measure, micro_batch, random_model

CARD_GB = 24.0


@dataclass(frozen=True)
class Row:
    """One comparison with a goal; `ours` and `peer` in `unit`, less is better. `ratio` is peer / ours."""

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    goal: float | None
    met: bool | None
    exactness: str
    evidence: str


class Comparisons:
    """
    Args:
        full: A micro-batch without padding.
        overrides: How ours runs.
        count: Timed steps of a side.
        is_dry: Tiny parts on the CPU.
    """

    def __init__(self, full: Shapes, overrides: Sequence[str], count: int, is_dry: bool) -> None:
        self.full, self.overrides, self.count, self.is_dry = full, list(overrides), count, is_dry
        self.device = torch.device(full.device)

    def head(self) -> list[Row]:
        """Forward and backward of the loss alone: all logits, and the learnt positions' in chunks."""
        from mgm_exp.model.head import summed_cross_entropy

        words, width, n = (4096, 64, 200) if self.is_dry else (256_000, 2048, 2048)
        dtype = torch.float32 if self.is_dry else torch.bfloat16
        draw = torch.Generator(self.device).manual_seed(0)
        hidden = torch.randn(n, width, device=self.device, dtype=dtype, generator=draw).requires_grad_()
        weight = torch.randn(words, width, device=self.device, dtype=dtype, generator=draw) * 0.02
        target = torch.randint(0, words, (n,), device=self.device, generator=draw)
        learnt = target.clone()
        learnt[: n - n // 3] = -100
        kept = (learnt != -100).nonzero().squeeze(1)

        def ours() -> float:
            hidden.grad = None
            loss = summed_cross_entropy(hidden[kept], weight, learnt[kept], kernel="fused") / len(kept)
            loss.backward()
            return float(loss.detach())

        def peer() -> float:
            hidden.grad = None
            logits = torch.nn.functional.linear(hidden, weight).float()
            loss = torch.nn.functional.cross_entropy(logits, learnt)
            loss.backward()
            return float(loss.detach())

        ours_s, peer_s, losses = self._side_by_side(ours, peer)
        what = f"{n} positions, a third learnt, {words:,} words, {str(dtype).removeprefix('torch.')}, weight frozen"
        apart = abs(losses[0] - losses[1])
        return [self._row("head: forward and backward of the loss", "ms", ours_s, peer_s, 1.1, apart, what)]

    def mining(self) -> list[Row]:
        """Forward and backward of patch info mining: native stages, and the official form on the joined map."""
        from mgm_exp.model.convnext import join_stages
        from mgm_exp.model.mining import mine, projection
        from mgm_exp.model.native_mining import mine_native

        side, width, widths = (4, 32, (8, 16)) if self.is_dry else (24, 1024, (192, 384, 768, 1536))
        half = None if self.is_dry else torch.bfloat16
        draw = torch.Generator(self.device).manual_seed(0)
        low = torch.randn(1, side * side, width, device=self.device, generator=draw)
        stages = [
            torch.randn(1, c, side * 8 >> i, side * 8 >> i, device=self.device, generator=draw)
            for i, c in enumerate(widths)
        ]
        parts = [projection(inside, width).to(self.device) for inside in (width, sum(widths), sum(widths))]

        def form(compute: Callable[[], Any]) -> Callable[[], float]:
            def step() -> float:
                for part in parts:
                    part.zero_grad()
                with torch.autocast(self.device.type, half, enabled=half is not None):
                    loss = compute().float().square().mean()
                loss.backward()
                return float(loss.detach())

            return step

        ours_s, peer_s, losses = self._side_by_side(
            form(lambda: mine_native(low, stages, *parts)),
            form(lambda: mine(low, join_stages(stages), parts[0], parts[1], parts[2])),
        )
        apart = abs(losses[0] / losses[1] - 1)
        what = "one image, projections trained, autocast bf16 (ours computes in fp32)"
        return [self._row("mining: forward and backward of the part", "ms", ours_s, peer_s, 4.0, apart, what)]

    def cache(self) -> list[Row]:
        """A step with what the towers see read, and computed; with the rest of the ladder but compilation."""
        from mgm_exp.compose import compose

        config = compose([*self.full.overrides, *self.overrides])
        found = []
        for sees_once in (True, False):
            steps = Steps(self.full, config, Rung("cache", (), sees_once=sees_once))
            found.append(self._steps_of(steps))
            del steps
            let_go(self.device)
        (ours_s, ours_loss), (peer_s, peer_loss) = found
        what = f"4 x {max(self.full.lengths)} tokens; features in GPU memory, reading and decoding are not in it"
        row = self._row("cache: a step with the towers' features", "ms", ours_s, peer_s, 1.1, 0.0, what)
        return [replace(row, exactness=f"losses apart by {abs(ours_loss - peer_loss):.1g}")]

    def trainer(self) -> list[Row]:
        """A step of ours and of transformers' Trainer with PEFT: the loop (same loss), and the peak (its own loss)."""
        from mgm_exp.compose import compose

        recomputing = [o for o in self.overrides if not o.startswith("model.gradient_checkpointing")]
        config = compose([*self.full.overrides, *recomputing, "model.gradient_checkpointing=true"])
        steps = Steps(self.full, config, Rung("ours", ()))
        ours_s, _ = self._steps_of(steps)
        ours_peak, ours_loaded = self._peak(), steps.loaded_gib or 0.0
        del steps
        let_go(self.device)
        found: list[Row] = []
        same_s, _, _ = self._trainer_steps(config, label_head=True)
        what = f"4 x {max(self.full.lengths)} tokens, LoRA r=16, all blocks recomputed, same loss and mining"
        found.append(
            self._row("loop: a step of ours and of Trainer + PEFT", "ms", ours_s, same_s, 1 / 1.03, None, what)
        )
        try:
            _, peer_peak, peer_loaded = self._trainer_steps(config, label_head=False)
        except torch.OutOfMemoryError:
            peer_peak, peer_loaded = card_gib(self.device), ours_loaded
            what += f"; the Trainer did not fit in {peer_peak:.0f} GiB"
        if self.device.type == "cuda":
            ours_above, peer_above = max(ours_peak - ours_loaded, 1e-3), peer_peak - peer_loaded
            found.append(self._row("memory above the loaded model", "GiB", ours_above, peer_above, 1 / 0.6, None, what))
            whole = self._row("memory: peak of it, under 24 GB", "GiB", ours_peak, CARD_GB * 1e9 / GIB, 1.0, None, what)
            found.append(whole)
        return found

    def _trainer_steps(self, config: Any, label_head: bool) -> tuple[float, float, float]:
        """Seconds of a Trainer's step, its peak and what was allocated before."""
        from peft import LoraConfig, get_peft_model
        from transformers import Trainer, TrainerCallback, TrainingArguments

        from mgm_exp.config import Device
        from mgm_exp.model.execution import run_as
        from mgm_exp.model.trainable import connector_names
        from mgm_exp.train.assemble import execution_of
        from mgm_exp.train.ranks import Ranks

        half = not self.is_dry
        model = random_model(config, self.device, torch.bfloat16 if half else torch.float32)
        model.config.tokenizer_model_max_length = max(self.full.lengths)
        if label_head:  # the same loss, in the same way; layers are PEFT's and transformers'
            execution = execution_of(config, "instruct", Ranks.alone(Device(self.full.device)))
            run_as(model, replace(execution, lora_kernel="peft", last_block="whole"))
        batch = {k: v for k, v in micro_batch(model, self.full).items() if isinstance(v, torch.Tensor)}
        targets = r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
        adapted: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        names = connector_names()
        for name, parameter in adapted.named_parameters():
            if name.removeprefix("base_model.model.") in names:
                parameter.data, parameter.requires_grad = parameter.data.float(), True
        loaded = torch.cuda.memory_allocated(self.device) / GIB if half else 0.0
        walls: list[float] = []

        class Watch(TrainerCallback):  # type: ignore[misc]
            began = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                _wait(batch["images"].device)
                Watch.began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                _wait(batch["images"].device)
                walls.append(time.perf_counter() - Watch.began)

        class OneBatch(Trainer):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
                return model.base_model.model.loss(inputs) if label_head else model(**inputs).loss

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,
                max_steps=WARM_UP + self.count,
                bf16=half,
                tf32=config.train.tf32 if half else None,
                use_cpu=not half,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
            )
            if half:
                torch.cuda.reset_peak_memory_stats(self.device)
            rows = [0] * (WARM_UP + self.count)
            OneBatch(
                model=adapted, args=arguments, train_dataset=rows, data_collator=lambda _: batch, callbacks=[Watch()]
            ).train()
        peak = self._peak()
        del adapted, model
        let_go(self.device)
        return statistics.median(walls[WARM_UP:]), peak, loaded

    def pack(self) -> list[Row]:
        """Eight trials in a pack and in turn, whole stages of a small model: what is idle at a micro-batch of 1."""
        from benchmarks.pack import prepared

        with tempfile.TemporaryDirectory() as folder:
            bench = prepared(Path(folder), 8 if self.is_dry else 32, 1 if self.is_dry else 6, self.full.device)
            found = bench.row(2 if self.is_dry else 8, 1, 1 if self.is_dry else 2)
        row = self._row("pack of 8: trials of micro-batch 1 in turn", "s", found.ours, found.peer, 1.5, None, "")
        return [replace(row, exactness=found.exactness, evidence=found.evidence)]

    def graphs(self) -> list[Row]:
        """The same pack without dropout, its passes replayed by CUDA graphs and launched kernel by kernel."""
        from benchmarks.pack import prepared

        with tempfile.TemporaryDirectory() as folder:
            found = prepared(Path(folder), 32, 24, self.full.device).graphs_row(8, 2)
        ratio = found.peer / found.ours
        return [Row(found.name, "s", found.ours, found.peer, ratio, None, None, found.exactness, found.evidence)]

    def evaluate(self) -> list[Row]:
        """Greedy answers of a fixed length to 16 questions, in one batch and one after the other."""
        from mgm_exp.compose import compose
        from mgm_exp.evaluate.greedy import greedy

        tokens = 4 if self.is_dry else 32
        length = 80 if self.is_dry else 700
        questions = replace(self.full, lengths=(length,) * (4 if self.is_dry else 16))
        config = compose([*self.full.overrides, "train.precision=" + ("fp32" if self.is_dry else "bf16")])
        model = random_model(config, self.device, torch.float32 if self.is_dry else torch.bfloat16).eval()
        batch = micro_batch(model, questions)
        keys = ("input_ids", "attention_mask", "images", "images_aux")

        @torch.no_grad()
        def ours() -> float:
            embeds, mask, _ = model.merge(**_cast({k: batch[k] for k in keys}, model), padding_side="left")
            said = greedy(model, embeds, mask, max_new_tokens=tokens, stop_ids=())
            return float(sum(map(len, said)))

        @torch.no_grad()
        def peer() -> float:
            count = 0
            for row in range(len(questions.lengths)):
                given = _cast({k: batch[k][row : row + 1] for k in keys}, model)
                count += model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens).shape[1]
            return float(count)

        ours_s, peer_s, counts = self._side_by_side(ours, peer, repeats=1 if self.is_dry else 3)
        what = f"{len(questions.lengths)} questions of {length} tokens, {tokens} new ones each: {counts[0]:.0f} and "
        what += f"{counts[1]:.0f} tokens"
        return [self._row("evaluate: one batch, and batch 1", "ms", ours_s, peer_s, 8.0, None, what)]

    def _steps_of(self, steps: Steps) -> tuple[float, float]:
        measure(steps.take, self.device, WARM_UP)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        walls, _, loss = measure(steps.take, self.device, self.count)
        return statistics.median(walls), loss

    def _side_by_side(
        self, ours: Callable[[], float], peer: Callable[[], float], repeats: int | None = None
    ) -> tuple[float, float, tuple[float, float]]:
        """Median seconds of both, alternated, and what they gave."""
        repeats = repeats or (2 if self.is_dry else 15)
        values = ours(), peer()
        seconds: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats):
            for place in (0, 1) if repeat % 2 == 0 else (1, 0):
                walls, _, _ = measure((ours, peer)[place], self.device, 1)
                seconds[place].append(walls[0])
        return statistics.median(seconds[0]), statistics.median(seconds[1]), values

    def _row(self, name: str, unit: str, ours: float, peer: float, goal: float, apart: float | None, what: str) -> Row:
        factor = 1000 if unit == "ms" else 1
        ratio = peer / ours
        met = None if self.is_dry else ratio >= goal
        exactness = "not compared" if apart is None else f"losses apart by {apart:.1g}"
        found = Row(name, unit, ours * factor, peer * factor, ratio, goal, met, exactness, what)
        print(f"  {name}: {ratio:.2f} x (goal {goal:.2f})", flush=True)
        return found

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else 0.0


def card_gib(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else 0.0


def _cast(given: dict[str, Any], model: Any) -> dict[str, Any]:
    return {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in given.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
