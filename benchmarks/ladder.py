"""A step of MGM-2B's shapes, run as a configuration says: what ``benchmarks/gpu.py`` measures.

Weights are random and made on the device: nothing is read or downloaded. A rung is a list of overrides as they would
stand on the command line, so that what pays here can be written into a run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import ExperimentConfig, plain

GIB = 1024**3
IMAGE, IGNORED = -200, -100
# Steps that are not counted: kernels are chosen, memory is taken, blocks are compiled.
WARM_UP = 2


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        name: for the table.
        overrides: what it adds to the rungs below.
        all_logits: the loss over the logits of all positions, as models of transformers have it.
        sees_once: what the towers see comes from a cache, in memory here.
        obstacle: why it cannot run on this machine; empty if it can.
    """

    name: str
    overrides: tuple[str, ...]
    all_logits: bool = False
    sees_once: bool = False
    obstacle: str = ""


@dataclass(frozen=True)
class Shapes:
    """What is trained on.

    Attributes:
        model: `mgm_2b`, or `tiny` to see whether everything runs.
        lengths: merged tokens of each sample of the micro-batch.
        device: `cuda` or `cpu`.
    """

    model: str
    lengths: tuple[int, ...]
    device: str

    @property
    def overrides(self) -> list[str]:
        """What all rungs share."""
        size = len(self.lengths)
        return [
            *(f"model={self.model}", "adapter=lora_r16", "train=official", "eval=demo", "device=auto"),
            *(f"train.micro_batch_size={size}", f"train.global_batch_size={size}", "train.warmup_ratio=0"),
            *(f"train.max_length={max(self.lengths)}", "train.max_steps=1000"),
        ]


@dataclass(frozen=True)
class Measured:
    """Of a rung's steps; memory is None on the CPU.

    Attributes:
        seconds: median wall time of a step.
        device_seconds: median between CUDA events around a step; None on the CPU.
        loaded_gib, peak_gib: allocated before the first step, and at most in a step.
        tokens_per_s: without padding.
        loss: of the last step.
    """

    seconds: float
    device_seconds: float | None
    loaded_gib: float | None
    peak_gib: float | None
    tokens_per_s: float
    loss: float


class Steps:
    """A model with LoRA, an optimizer and one micro-batch on the device; :meth:`take` is an optimizer step of ours."""

    def __init__(self, shapes: Shapes, config: ExperimentConfig, rung: Rung) -> None:
        from mgm_exp.config import Device, Precision
        from mgm_exp.model import apply_adapter, set_trainable
        from mgm_exp.model.execution import run_as
        from mgm_exp.train.assemble import execution_of, make_engine
        from mgm_exp.train.engine import COMPUTE_DTYPE
        from mgm_exp.train.job import stage_settings
        from mgm_exp.train.ranks import Ranks

        self.shapes, self.config = shapes, config
        self.device = torch.device(shapes.device)
        self.settings = stage_settings(config, "instruct")
        self.ranks = Ranks.alone(Device(shapes.device))
        dtype = COMPUTE_DTYPE[self.settings.precision]
        self.model = random_model(config, self.device, dtype)
        self.model.config.tokenizer_model_max_length = max(shapes.lengths)
        apply_adapter(self.model, config.adapter, 0)
        trainable = set_trainable(self.model, "instruct", config.adapter, config.train.freeze_connector)
        self.model.train()
        if self.settings.precision is not Precision.fp32:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        run_as(self.model, execution_of(config, "instruct", self.ranks))
        module = LossOfAllLogits(self.model) if rung.all_logits else _loss_module(self.model)
        self.engine = make_engine(module, trainable, config, self.settings, self.ranks)
        self.batch = micro_batch(self.model, shapes)
        if rung.sees_once:
            self.batch = seen_once(self.model, self.batch, self.settings.precision.value != "fp32", dtype)
        self.loaded_gib = _allocated(self.device)
        self.number = 0

    def take(self) -> float:
        """One optimizer step; its loss."""
        from mgm_exp.train.step import CountedBatch, alone, take_step

        learnt = sum(learnt_of(length, self.model) for length in self.shapes.lengths)
        micro = CountedBatch(self.batch, learnt, sum(self.shapes.lengths), len(self.shapes.lengths), len(self.batch))
        found = alone(take_step(self.engine, self.settings, self.ranks, [micro], self.number, 1.0)).outcome()
        self.number += 1
        return found.loss


class LossOfAllLogits(nn.Module):
    """The loss of the model's `forward`: logits of every position, prompts and images included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any], normalizer: float | None = None) -> Tensor:
        keys = ("input_ids", "attention_mask", "labels", "images", "images_aux")
        loss: Tensor = self.model(**{key: batch[key] for key in keys}).loss
        return loss


def _loss_module(model: Any) -> nn.Module:
    from mgm_exp.model import LossModule

    return LossModule(model)


def random_model(config: ExperimentConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """MGM of a preset's shapes with random weights, made where it is to be."""
    from transformers.initialization import no_init_weights

    from mgm_exp.model import known_config, load_model
    from mgm_exp.model.attention import choose_attention
    from mgm_exp.model.loading import freeze_towers
    from mgm_exp.model.mgm import new_model
    from mgm_exp.preflight import TINY

    shapes = load_model(TINY).config if config.model.name == "tiny" else known_config(config.model.name)
    shapes._attn_implementation = choose_attention(config.model.attn_implementation.value, device, dtype).name
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = new_model(shapes)
            model.tie_weights()
    finally:
        torch.set_default_dtype(before)
    if shapes.embed_scale != 1.0:  # a buffer that a bf16 default would have rounded
        model.model.embed_tokens.embed_scale = torch.tensor(shapes.embed_scale, dtype=torch.float32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
    freeze_towers(model)
    if blocks := config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing(blocks)
    model.model.mines_natively = config.model.mining.value == "native"
    return model


def visual_tokens_of(model: Any) -> int:
    """Embeddings that take the place of one image."""
    vision = model.config.vision_config
    return int((vision["image_size"] // vision["patch_size"]) ** 2)


def learnt_of(length: int, model: Any) -> int:
    """Tokens of a sample that are learnt: the later half of its text."""
    return (length - visual_tokens_of(model)) // 2


def micro_batch(model: Any, shapes: Shapes) -> dict[str, Any]:
    """Random samples of the given merged lengths, each with an image, on the device."""
    draw = torch.Generator().manual_seed(1)
    visual = visual_tokens_of(model)
    texts = [length - visual for length in shapes.lengths]
    assert min(texts) > 1, "a sample is longer than its image"
    ids = torch.full((len(texts), max(texts) + 1), 0)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORED)
    for row, (text, length) in enumerate(zip(texts, shapes.lengths, strict=True)):
        ids[row, 0] = IMAGE
        ids[row, 1 : text + 1] = torch.randint(10, model.config.vocab_size, (text,), generator=draw)
        mask[row, : text + 1] = True
        learnt = learnt_of(length, model)
        labels[row, text + 1 - learnt : text + 1] = ids[row, text + 1 - learnt : text + 1]
    low = int(model.config.vision_config["image_size"])
    high = 768 if low == 336 else 128
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "images": torch.randn(len(texts), 3, low, low, generator=draw),
        "images_aux": torch.randn(len(texts), 3, high, high, generator=draw),
    }
    batch: dict[str, Any] = {key: value.to(shapes.device) for key, value in given.items()}
    return {**batch, "ids": [str(row) for row in range(len(texts))]}


def seen_once(model: Any, batch: dict[str, Any], is_half: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The same batch with what the towers see in place of its pixels, as `train.feature_cache=towers` gives it."""
    from mgm_exp.model.features import HIGH, LOW

    device = batch["images"].device
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=is_half):
        low = model.model.see_low(batch["images"])
        stages = model.model.vision_tower_aux(batch["images_aux"], joined=False)
    seen = {LOW: low, **{f"{HIGH}{i}": stage.permute(0, 2, 3, 1).contiguous() for i, stage in enumerate(stages)}}
    kept = {key: value for key, value in batch.items() if not key.startswith("images")}
    return {**kept, "seen": seen}


def measure(step: Callable[[], float], device: torch.device, count: int) -> tuple[list[float], list[float], float]:
    """Wall seconds and seconds between CUDA events of each step, and the last loss."""
    walls, events, loss = [], [], 0.0
    for _ in range(count):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
        began = time.perf_counter()
        loss = step()
        if device.type == "cuda":
            end.record()
            torch.cuda.synchronize(device)
            events.append(begin.elapsed_time(end) / 1000)
        walls.append(time.perf_counter() - began)
    return walls, events, loss


def run_rung(shapes: Shapes, overrides: Sequence[str], rung: Rung, count: int) -> Measured:
    """Builds everything anew, takes steps, and lets go of it.

    Raises:
        torch.OutOfMemoryError: it does not fit; everything is let go of.
    """
    from mgm_exp.compose import compose
    from mgm_exp.plan import fitted
    from mgm_exp.train.tf32 import tf32

    config = fitted(compose([*shapes.overrides, *overrides]), "instruct")
    device = torch.device(shapes.device)
    steps: Steps | None = None
    try:
        with tf32(config.train.tf32):
            steps = Steps(shapes, config, rung)
            measure(steps.take, device, WARM_UP)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            walls, events, loss = measure(steps.take, device, count)
        peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
        seconds = statistics.median(walls)
        return Measured(
            seconds=seconds,
            device_seconds=statistics.median(events) if events else None,
            loaded_gib=steps.loaded_gib,
            peak_gib=peak,
            tokens_per_s=sum(shapes.lengths) / seconds,
            loss=loss,
        )
    finally:
        del steps
        let_go(device)


def let_go(device: torch.device) -> None:
    """Gives memory back that nobody holds."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else None


def with_overrides(rungs: Sequence[Rung]) -> list[tuple[Rung, list[str]]]:
    """Each rung with the overrides of all below it; a later value of a key takes the place of an earlier one."""
    found: list[tuple[Rung, list[str]]] = []
    so_far: dict[str, str] = {}
    for rung in rungs:
        so_far |= dict(override.split("=", 1) for override in rung.overrides)
        found.append((rung, [f"{key}={value}" for key, value in so_far.items()]))
    return found


def described(config: ExperimentConfig) -> dict[str, Any]:
    """Of a rung's configuration, what says how it ran."""
    return {"model": plain(replace(config.model)), "train": plain(config.train)}
