"""Make the tiny base model that `model=tiny` starts from, from nothing but generated pictures.

    python -m mgm_exp.train.make_tiny --out outputs/tiny_base

Three phases, counted in steps (see `mgm_exp.train.tiny`): glyph pages, scenes with dense labels, captions and other
requests. Everything is seeded; equal seeds, versions and thread counts give equal weights. A phase that is finished
is kept in the work folder, and the same command continues after an interruption.

The result is a complete MGM: both towers, mining, projector and LLM, in bf16, with tokenizer and model card.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mgm_exp.data.demo.corpus import SceneSet, make_pages, make_scenes
from mgm_exp.data.demo.making import make_from_command_line
from mgm_exp.data.demo.scenes import GENERATOR_VERSION
from mgm_exp.data.demo.teaching import Report
from mgm_exp.errors import UserError
from mgm_exp.model.clip import ClipTower
from mgm_exp.model.convnext import ConvNeXtTower
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.train.tiny.base_config import LOW_SIDE, TINY_CLIP, TINY_CONVNEXT, WIDTH, WIDTH_AUX, tiny_config
from mgm_exp.train.tiny.card import base_card
from mgm_exp.train.tiny.joint import CellHead, train_jointly
from mgm_exp.train.tiny.measure import measure_captions, measure_reading
from mgm_exp.train.tiny.tokenizer import make_tokenizer, save_tokenizer
from mgm_exp.train.tiny.towers import TowerHeads, train_on_pages, train_on_scenes


@dataclass(frozen=True)
class Recipe:
    """How long and how fast each phase trains; the values are those of the shipped weights.

    Args:
        n_pages, n_scenes, n_probe: pictures made for phase 1, for phases 2 and 3, and for measuring.
        page_steps, scene_steps, joint_steps: optimizer steps of the three phases.
        *_batch: pictures a step. *_lr: peak learning rates.
        rounds: requests about one picture in phase 3.
        seed: seed of pictures, initialisation, order and conversations.
    """

    n_pages: int = 28_000
    n_scenes: int = 24_000
    n_probe: int = 400
    page_steps: int = 700
    page_batch: int = 64
    page_lr: float = 4e-3
    scene_steps: int = 550
    scene_batch: int = 64
    scene_lr: float = 3e-3
    joint_steps: int = 1200
    joint_batch: int = 32
    joint_lr: float = 3e-3
    rounds: int = 5
    seed: int = 0

    def scaled(self, scale: float) -> Recipe:
        """A shorter (or longer) recipe: steps and pictures times `scale`, at least a handful of each."""
        steps = {n: max(2, round(getattr(self, n) * scale)) for n in ("page_steps", "scene_steps", "joint_steps")}
        least = {"n_pages": self.page_batch, "n_scenes": max(self.scene_batch, self.joint_batch), "n_probe": 10}
        sizes = {n: min(getattr(self, n), max(low, round(getattr(self, n) * scale))) for n, low in least.items()}
        return replace(self, **steps, **sizes)


class _Towers(nn.Module):
    """What phases 1 and 2 train: both towers, and heads that are thrown away."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tower = ClipTower(TINY_CLIP, -2, "sdpa")
        self.tower_aux = ConvNeXtTower(TINY_CONVNEXT)
        self.heads = TowerHeads(WIDTH_AUX, WIDTH)


class _Whole(nn.Module):
    """What phase 3 trains: the model on given towers, and a head that is thrown away."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = MGMForConditionalGeneration(tiny_config(vocab_size))
        torch.manual_seed(seed + 1)
        self.cell_head = CellHead(self.model.config.hidden_size)


def _channels_last(tower_aux: nn.Module) -> None:
    """The backward pass of depthwise convolutions is 2.4 x faster so."""
    for module in tower_aux.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_base(
    out: Path, recipe: Recipe, *, work: Path, report: Report | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Train the tiny base and write it to `out`.

    Args:
        out: folder of the result: `config.json`, `model.safetensors` (bf16), tokenizer files, `README.md`,
            `recipe.json`.
        work: folder for the state between phases; phases found there are not repeated.
        report: called after each step.
        workers: processes for making pictures.

    Returns:
        The measures written to `recipe.json`: caption fields and reading on unseen scenes.

    Raises:
        UserError: the work folder belongs to another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, recipe)
    seed, picture_seed = recipe.seed, recipe.seed + 1
    towers = _Towers(seed)
    _channels_last(towers.tower_aux)
    scenes: list[SceneSet] = []

    def scene_set() -> SceneSet:
        if not scenes:
            scenes.append(make_scenes(recipe.n_scenes, seed=picture_seed, workers=workers))
        return scenes[0]

    def pages() -> None:
        train_on_pages(
            towers.tower_aux,
            towers.heads,
            make_pages(recipe.n_pages, seed=picture_seed, workers=workers),
            steps=recipe.page_steps,
            batch=recipe.page_batch,
            lr=recipe.page_lr,
            seed=seed + 11,
            report=report,
        )

    def dense() -> None:
        train_on_scenes(
            towers.tower,
            towers.tower_aux,
            towers.heads,
            scene_set(),
            steps=recipe.scene_steps,
            batch=recipe.scene_batch,
            lr=recipe.scene_lr,
            seed=seed + 12,
            low_side=LOW_SIDE,
            report=report,
        )

    tokenizer = make_tokenizer()

    def joint() -> None:
        train_jointly(
            whole.model,
            whole.cell_head,
            tokenizer,
            scene_set(),
            steps=recipe.joint_steps,
            batch=recipe.joint_batch,
            rounds=recipe.rounds,
            lr=recipe.joint_lr,
            seed=seed + 13,
            report=report,
        )

    _once(work / "1_pages.safetensors", towers, pages)
    _once(work / "2_scenes.safetensors", towers, dense)
    whole = _Whole(seed, tokenizer.get_vocab_size())
    body = whole.model.model
    body.vision_tower.load_state_dict(towers.tower.state_dict())
    body.vision_tower_aux.load_state_dict(towers.tower_aux.state_dict())
    _channels_last(body.vision_tower_aux)
    _once(work / "3_joint.safetensors", whole, joint)
    whole.model.tie_weights()
    probe = make_scenes(recipe.n_probe, seed=picture_seed, split="probe", random_share=0.0, workers=workers)
    return write_base(out, whole.model, recipe, probe)


def _once(path: Path, parts: nn.Module, train: Callable[[], None]) -> None:
    """Run a phase and keep its result, or take the kept one."""
    if path.exists():
        parts.load_state_dict(load_file(path))
        return
    train()
    partial = path.with_suffix(".partial")
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in parts.state_dict().items()}
    save_file(tensors, partial)
    os.replace(partial, path)


def _claim(work: Path, recipe: Recipe) -> None:
    """The work folder belongs to one recipe: another one must not continue from its phases."""
    path, text = work / "recipe.json", json.dumps(asdict(recipe), indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"make_tiny: the work folder {work} holds phases of another recipe; give another --work folder or "
            "remove it."
        )
    path.write_text(text, encoding="utf-8")


def write_base(out: Path, model: MGMForConditionalGeneration, recipe: Recipe, probe: SceneSet) -> dict[str, Any]:
    """Round to bf16, measure what was rounded, and write the folder."""
    tokenizer = make_tokenizer()
    tensors = {
        name: tensor.detach().to(torch.bfloat16).clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding, absent from official files too
    }
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    model.tie_weights()
    model.eval()
    measures = {
        "captions": measure_captions(model, tokenizer, probe),
        "reading": measure_reading(model, tokenizer, probe),
        "n_probe": len(probe),
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["MGMGemmaForCausalLM"]
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, out)
    record = {
        "recipe": asdict(recipe),
        "measures": measures,
        "generator_version": GENERATOR_VERSION,
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }
    (out / "recipe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    n_parameters = sum(t.numel() for t in tensors.values())
    (out / "README.md").write_text(base_card(record, n_parameters), encoding="utf-8")
    return measures


def main(arguments: list[str] | None = None) -> None:
    """The command line."""

    def make(out: Path, recipe: Recipe, work: Path, report: Report) -> dict[str, Any]:
        return make_base(out, recipe, work=work, report=report)

    says = str(__doc__).splitlines()[0]
    make_from_command_line("python -m mgm_exp.train.make_tiny", says, Recipe(), make, arguments)


if __name__ == "__main__":
    main()
