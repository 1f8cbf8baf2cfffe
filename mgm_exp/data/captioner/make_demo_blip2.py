"""Train demo-blip2, the small shipped captioner, from nothing but generated pictures.

    python -m mgm_exp.data.captioner.make_demo_blip2 --out outputs/demo_blip2

Phases, counted in steps: glyph pages and scenes with dense labels (vision model); its tokens of all scenes, cached;
then Q-Former and OPT on captions, with queries that are each told what to look for ("character 2 of the upper
object"), which only a generator can supervise. Heads are thrown away. Everything is seeded.
"""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mgm_exp.data.captioner.card import captioner_card
from mgm_exp.data.captioner.demo_blip2 import (
    COMPACT_IMAGE,
    COMPACT_ROWS,
    N_QUERIES,
    caption_tokenizer,
    compact_state,
    new_model,
    write_config,
    write_folder,
)
from mgm_exp.data.demo.captions import rich_caption, score_caption
from mgm_exp.data.demo.corpus import (
    CHARACTER_CLASS,
    COLOUR_CLASS,
    GRID,
    KIND_CLASS,
    N_CHARACTER,
    N_COLOUR,
    N_INDEX,
    N_KIND,
    N_LAST,
    N_SHAPE,
    SHAPE_CLASS,
    Pages,
    SceneSet,
    make_pages,
    make_scenes,
)
from mgm_exp.data.demo.making import make_from_command_line
from mgm_exp.data.demo.scenes import GENERATOR_VERSION, Item, Scene
from mgm_exp.data.demo.teaching import Report, Sampler, dense_loss, found_share, normalised, optimise
from mgm_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration

SLOT_CHARACTERS = 5
"""Queries 0-4 and 5-9 name the characters of the upper and lower object, 10-12 and 13-15 kind, colour and shape."""
SIDE = 16  # the vision model's tokens along one side of the image
EOS_ID, PAD_ID = 2, 1


@dataclass(frozen=True)
class Recipe:
    """How long and how fast each phase trains; the values are those of the shipped weights."""

    n_pages: int = 28_000
    n_scenes: int = 16_000
    n_probe: int = 400
    page_steps: int = 600
    page_batch: int = 24
    page_lr: float = 2e-3
    scene_steps: int = 600
    scene_batch: int = 32
    scene_lr: float = 2e-3
    mixed_steps: int = 400
    mixed_scenes: int = 24
    mixed_pages: int = 8
    mixed_lr: float = 1.8e-3
    caption_steps: int = 1600
    caption_batch: int = 48
    caption_lr: float = 3e-3
    seed: int = 2

    def scaled(self, scale: float) -> Recipe:
        """A shorter (or longer) recipe: steps and pictures times `scale`, at least a handful of each."""
        names = ("page_steps", "scene_steps", "mixed_steps", "caption_steps")
        steps = {n: max(2, round(getattr(self, n) * scale)) for n in names}
        least = {"n_pages": 4 * self.page_batch, "n_scenes": max(self.scene_batch, self.caption_batch), "n_probe": 10}
        sizes = {n: min(getattr(self, n), max(low, round(getattr(self, n) * scale))) for n, low in least.items()}
        return replace(self, **steps, **sizes)


class ViewHeads(nn.Module):
    """Throw-away classifiers on the vision model's tokens; each token sees 2 x 2 positions of the stride-4 labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = nn.ModuleList(nn.Linear(width, 4 * n) for n in (N_CHARACTER, N_INDEX, N_LAST))
        self.cells = nn.ModuleList(nn.Linear(width, n) for n in (N_KIND, N_COLOUR, N_SHAPE))

    def position_logits(self, tokens: Tensor, which: int) -> Tensor:
        """(B, 256, width) -> (B, 32, 32, classes)."""
        x = self.positions[which](tokens).unflatten(-1, (2, 2, -1)).unflatten(1, (SIDE, SIDE))  # (B, 16, 16, 2, 2, n)
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


class SlotHeads(nn.Module):
    """Throw-away classifiers on the queries: what query k must have found."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Linear(width, N_CHARACTER)
        self.labels = nn.ModuleList(nn.Linear(width, n) for n in (N_KIND, N_COLOUR, N_SHAPE))

    def loss(self, queries: Tensor, slots: Tensor) -> tuple[Tensor, dict[str, float]]:
        """`queries` (B, 20, width), `slots` (B, 16) classes."""
        n = 2 * SLOT_CHARACTERS
        characters = self.characters(queries[:, :n])
        loss = F.cross_entropy(characters.flatten(0, 1), slots[:, :n].flatten())
        right = 0.0
        for k, head in enumerate(self.labels):
            for position in range(2):
                place = n + 3 * position + k
                logits = head(queries[:, place])
                loss = loss + 0.2 * F.cross_entropy(logits, slots[:, place])
                right += float((logits.detach().argmax(-1) == slots[:, place]).float().mean()) / 6
        return loss, {"slot characters": found_share(characters.detach(), slots[:, :n]), "slot objects": right}


def slots_of(items: tuple[Item, Item]) -> list[int]:
    """The 16 classes that the first 16 queries must name."""
    made = []
    for item in items:
        padded = [CHARACTER_CLASS[c] for c in item.text[:SLOT_CHARACTERS]]
        made += padded + [0] * (SLOT_CHARACTERS - len(padded))
    for item in items:
        made += [KIND_CLASS[item.kind], COLOUR_CLASS[item.colour], SHAPE_CLASS[item.shape]]
    return made


@dataclass
class _Parts:
    model: Blip2ForConditionalGeneration
    view_heads: ViewHeads
    slot_heads: SlotHeads

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "view_heads": self.view_heads, "slot_heads": self.slot_heads}

    def save(self, path: Path) -> None:
        tensors = {
            f"{part}/{name}": tensor.detach().contiguous().clone()
            for part, module in self.modules().items()
            for name, tensor in module.state_dict().items()
        }
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        tensors = load_file(path)
        for part, module in self.modules().items():
            prefix = f"{part}/"
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        self.model.tie_weights()


def _tokens(model: Blip2ForConditionalGeneration, pixels: np.ndarray) -> Tensor:
    """The vision model's patch tokens (B, 256, width), class token dropped."""
    return model.vision_model(normalised(pixels).contiguous()).last_hidden_state[:, 1:]


def _page_loss(parts: _Parts, pages: Pages, rows: np.ndarray) -> tuple[Tensor, dict[str, float]]:
    tile = rows.reshape(-1, 2, 2)
    pixels = np.concatenate([np.concatenate([pages.pixels[tile[:, i, j]] for j in (0, 1)], 2) for i in (0, 1)], 1)
    classes = np.concatenate([np.concatenate([pages.characters[tile[:, i, j]] for j in (0, 1)], 2) for i in (0, 1)], 1)
    logits = parts.view_heads.position_logits(_tokens(parts.model, pixels), 0)
    target = torch.from_numpy(classes)
    return dense_loss(logits, target), {"page characters": found_share(logits.detach(), target)}


def _scene_loss(parts: _Parts, scenes: SceneSet, rows: np.ndarray) -> tuple[Tensor, dict[str, float]]:
    tokens = _tokens(parts.model, scenes.pixels[rows])
    positions = torch.from_numpy(scenes.positions[rows])
    cells = torch.from_numpy(scenes.cells[rows])
    loss, measures = torch.zeros(()), {}
    for which, (name, weight) in enumerate((("characters", 2.0), ("index", 1.0), ("last", 0.3))):
        logits = parts.view_heads.position_logits(tokens, which)
        loss = loss + weight * dense_loss(logits, positions[:, which])
        measures[name] = found_share(logits.detach(), positions[:, which])
    wide = cells.repeat_interleave(SIDE // GRID, 2).repeat_interleave(SIDE // GRID, 3).flatten(2)  # (B, 3, 256)
    for k, name in enumerate(("kinds", "colours", "shapes")):
        logits = parts.view_heads.cells[k](tokens)
        loss = loss + 0.4 * dense_loss(logits, wide[:, k])
        measures[name] = found_share(logits.detach(), wide[:, k])
    return loss, measures


def _train_view(
    parts: _Parts, recipe: Recipe, pages: Pages, scenes: SceneSet, phase: int, report: Report | None
) -> None:
    modules = (parts.model.vision_model, parts.view_heads)
    page_rows = Sampler(len(pages), 4 * (recipe.mixed_pages if phase == 3 else recipe.page_batch), recipe.seed + phase)
    scene_rows = Sampler(
        len(scenes), recipe.mixed_scenes if phase == 3 else recipe.scene_batch, recipe.seed + 20 + phase
    )

    def mixed(step: int) -> tuple[Tensor, dict[str, float]]:
        loss, measures = _scene_loss(parts, scenes, scene_rows())
        page_loss, page_measures = _page_loss(parts, pages, page_rows())
        return loss + page_loss, measures | page_measures

    if phase == 1:
        optimise("vision: glyph pages", modules, lambda step: _page_loss(parts, pages, page_rows()),
                 steps=recipe.page_steps, lr=recipe.page_lr, report=report)  # fmt: skip
    elif phase == 2:
        optimise("vision: scenes", modules, lambda step: _scene_loss(parts, scenes, scene_rows()),
                 steps=recipe.scene_steps, lr=recipe.scene_lr, report=report)  # fmt: skip
    else:
        optimise("vision: both", modules, mixed, steps=recipe.mixed_steps, lr=recipe.mixed_lr, report=report)


@torch.no_grad()
def _features(model: Blip2ForConditionalGeneration, scenes: SceneSet, report: Report | None) -> Tensor:
    """Class and patch tokens of all scenes in fp16: 1 GB for 16,000 scenes."""
    model.eval()
    width = model.config.vision_config.hidden_size
    features = torch.empty((len(scenes), SIDE * SIDE + 1, width), dtype=torch.float16)
    for start in range(0, len(scenes), 100):
        pixels = normalised(scenes.pixels[start : start + 100]).contiguous()
        features[start : start + 100] = model.vision_model(pixels).last_hidden_state.half()
        if report is not None:
            report("vision tokens", min(start + 100, len(scenes)), len(scenes), {})
    return features


def caption_loss(model: Blip2ForConditionalGeneration, queries: Tensor, rows: list[list[int]]) -> Tensor:
    """Cross-entropy of captions (and their `</s>`) after the projected queries and OPT's first `</s>`."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD_ID)
    labels = torch.full((len(rows), longest), -100)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
        labels[k, 1 : len(row)] = torch.tensor(row[1:])
    words = model.get_input_embeddings()(ids)
    embeds = torch.cat([model.language_projection(queries), words], dim=1)
    logits = model.language_model(inputs_embeds=embeds).logits[:, N_QUERIES:-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def _train_captions(parts: _Parts, recipe: Recipe, scenes: SceneSet, features: Tensor, report: Report | None) -> None:
    model = parts.model
    model.vision_model.requires_grad_(False)
    tokenizer = caption_tokenizer()
    slots = torch.tensor([slots_of(items) for items in scenes.items])
    rng = random.Random(f"mgm-captions/{recipe.seed}")
    sampler = Sampler(len(scenes), recipe.caption_batch, recipe.seed + 40)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = sampler()
        seen = features[torch.from_numpy(rows)].float()
        queries = model.qformer(
            query_embeds=model.query_tokens.expand(len(rows), -1, -1), encoder_hidden_states=seen
        ).last_hidden_state
        found, measures = parts.slot_heads.loss(queries, slots[torch.from_numpy(rows)])
        texts = [rich_caption(Scene(0, "pretrain", scenes.items[row], 0), rng) for row in rows]
        words = caption_loss(model, queries, [[*tokenizer.encode(t).ids, EOS_ID] for t in texts])
        return words + found, {"caption": float(words.detach()), **measures}

    modules = (_Rest(model), parts.slot_heads)
    optimise("captions", modules, step_loss, steps=recipe.caption_steps, lr=recipe.caption_lr, report=report)
    model.vision_model.requires_grad_(True)


class _Rest(nn.Module):
    """The parts that the caption phase trains: queries, Q-Former, projection, OPT."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.query_tokens = model.query_tokens
        self.parts = nn.ModuleList([model.qformer, model.language_projection, model.language_model])


def make_captioner(
    out: Path, recipe: Recipe, *, work: Path, report: Report | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Train the captioner and write its compact weights, `recipe.json` and model card to `out`.

    Phases found in `work` are not repeated. Returns the measures: shares of right fields in greedy captions of unseen
    scenes, from the bf16 weights through the ordinary BLIP-2 folder.

    Raises:
        UserError: the work folder belongs to another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    claim, text = work / "recipe.json", json.dumps(asdict(recipe), indent=1)
    if claim.exists() and claim.read_text(encoding="utf-8") != text:
        raise UserError(
            f"make_demo_blip2: {work} holds phases of another recipe; give another --work folder or remove it."
        )
    claim.write_text(text, encoding="utf-8")
    torch.manual_seed(recipe.seed)
    model = new_model()
    width = model.config.vision_config.hidden_size
    parts = _Parts(model, ViewHeads(width), SlotHeads(model.config.qformer_config.hidden_size))
    kept: dict[str, Any] = {}

    def pages() -> Pages:
        return kept.setdefault(
            "pages", kept.get("pages") or make_pages(recipe.n_pages, seed=recipe.seed, workers=workers)
        )

    def scenes() -> SceneSet:
        return kept.setdefault(
            "scenes", kept.get("scenes") or make_scenes(recipe.n_scenes, seed=recipe.seed, workers=workers)
        )

    def captions() -> None:
        kept.pop("pages", None)
        _train_captions(parts, recipe, scenes(), _features(model, scenes(), report), report)

    phases: tuple[tuple[str, Callable[[], None]], ...] = (
        ("1_pages", lambda: _train_view(parts, recipe, pages(), scenes(), 1, report)),
        ("2_scenes", lambda: _train_view(parts, recipe, pages(), scenes(), 2, report)),
        ("3_both", lambda: _train_view(parts, recipe, pages(), scenes(), 3, report)),
        ("4_captions", captions),
    )
    done = [name for name, _ in phases if (work / f"{name}.safetensors").exists()]
    if done:
        parts.load(work / f"{done[-1]}.safetensors")
    for name, train in phases[len(done) :]:
        model.train()
        train()
        parts.save(work / f"{name}.safetensors")
    kept.clear()
    save_file(compact_state(model), out / "model.safetensors", metadata={"format": "pt"})
    write_config(out, COMPACT_ROWS, COMPACT_IMAGE)
    probe = make_scenes(recipe.n_probe, seed=recipe.seed, split="probe", random_share=0.0, workers=workers)
    return _describe(out, work, recipe, probe)


def _describe(out: Path, work: Path, recipe: Recipe, probe: SceneSet) -> dict[str, Any]:
    """Measure the written weights through an ordinary BLIP-2 folder, then write `recipe.json` and the card."""
    import shutil

    from PIL import Image

    from mgm_exp.data.captioner.blip2 import Blip2Captioner

    folder = work / "expanded"
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, weights=out / "model.safetensors")
    captioner = Blip2Captioner(folder)
    captions = captioner.caption([Image.fromarray(p) for p in probe.pixels], batch_size=100)
    shutil.rmtree(folder)
    totals: dict[str, list[int]] = {}
    for caption, items in zip(captions, probe.items, strict=True):
        for name, (right, asked) in score_caption(caption, Scene(0, "probe", items, 0)).items():
            total = totals.setdefault(name, [0, 0])
            total[0] += right
            total[1] += asked
    measures = {name: right / asked if asked else 0.0 for name, (right, asked) in totals.items()}
    record: dict[str, Any] = {
        "recipe": asdict(recipe),
        "measures": {"captions": measures, "n_probe": len(probe)},
        "generator_version": GENERATOR_VERSION,
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }
    n_parameters = sum(t.numel() for t in load_file(out / "model.safetensors").values())
    (out / "recipe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(captioner_card(record, n_parameters), encoding="utf-8")
    return dict(record["measures"])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""

    def make(out: Path, recipe: Recipe, work: Path, report: Report) -> dict[str, Any]:
        return make_captioner(out, recipe, work=work, report=report)

    says = str(__doc__).splitlines()[0]
    make_from_command_line("python -m mgm_exp.data.captioner.make_demo_blip2", says, Recipe(), make, arguments)


if __name__ == "__main__":
    main()
