"""Phase 3 of the tiny base: mining, projector and LLM learn captions and requests on frozen towers.

Loss: cross-entropy of the answers, text tokens three times, plus an auxiliary loss: from each visual token a
throw-away head must name, for each index in a string, the character of that index in the token's cell, and the
kind, colour and shape of the object there. Without the index and this loss the LLM learnt attributes but no reading.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from mgm_exp.data.demo.corpus import N_CHARACTER, N_COLOUR, N_KIND, N_SHAPE, SceneSet
from mgm_exp.data.demo.scenes import MAX_TEXT, Item, Scene
from mgm_exp.data.demo.teaching import Report, Sampler, dense_loss, found_share, normalised, optimise
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.train.tiny.conversations import ConversationEncoder, Round, base_rounds, pad_batch, token_weights
from mgm_exp.train.tiny.towers import low_resolution

TEXT_WEIGHT = 3.0
CELL_WEIGHT = 0.5


class CellHead(nn.Module):
    """Throw-away linear classifiers on the visual tokens: (B, 64, hidden) -> slots, kind, colour, shape."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.slots = nn.Linear(hidden, MAX_TEXT * N_CHARACTER)
        self.labels = nn.ModuleList(nn.Linear(hidden, n) for n in (N_KIND, N_COLOUR, N_SHAPE))

    def forward(self, visual: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Slot logits (B, 64, 6, classes) and the three label logits (B, 64, classes)."""
        return self.slots(visual).unflatten(-1, (MAX_TEXT, N_CHARACTER)), [head(visual) for head in self.labels]

    def loss(self, visual: Tensor, slots: Tensor, cells: Tensor) -> tuple[Tensor, float]:
        """Loss, and the accuracy over slots that hold a character. `slots` (B, 6, 8, 8), `cells` (B, 3, 8, 8)."""
        slot_logits, label_logits = self(visual)
        slot_target = slots.flatten(2).transpose(1, 2)  # (B, 64, 6)
        loss = dense_loss(slot_logits, slot_target)
        for k, logits in enumerate(label_logits):
            loss = loss + 0.2 * dense_loss(logits, cells[:, k].flatten(1))
        return loss, found_share(slot_logits.detach(), slot_target)


def answer_loss(
    model: MGMForConditionalGeneration, batch: dict[str, Tensor], visual: Tensor, weights: Tensor
) -> tuple[Tensor, float]:
    """Weighted cross-entropy of the supervised tokens, and the accuracy over tokens of weight above 1."""
    embeds, _, labels = model.merge(batch["input_ids"], batch["attention_mask"], batch["labels"], visual_tokens=visual)
    # No mask: rows are padded on the right, so causal attention never shows a supervised token the padding.
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    target = labels[:, 1:].flatten()
    kept = (target >= 0).nonzero().squeeze(1)
    logits, target = model.lm_head(hidden[:, :-1].flatten(0, 1)[kept]), target[kept]
    weight = weights[target]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    is_text = weight > 1
    right = (logits.detach().argmax(-1) == target)[is_text]
    return loss, float(right.float().mean()) if len(right) else 0.0


def freeze_towers(model: MGMForConditionalGeneration) -> None:
    """Both towers without gradients and in eval mode."""
    for tower in (model.model.vision_tower, model.model.vision_tower_aux):
        tower.requires_grad_(False)
        tower.eval()


def train_jointly(
    model: MGMForConditionalGeneration,
    cell_head: CellHead,
    tokenizer: Tokenizer,
    scenes: SceneSet,
    *,
    steps: int,
    batch: int,
    rounds: int,
    lr: float,
    seed: int,
    phase: str = "joint",
    report: Report | None = None,
) -> None:
    """Train mining, projector and LLM; the towers are frozen by this function."""
    freeze_towers(model)
    sampler = Sampler(len(scenes), min(batch, len(scenes)), seed)
    rng = random.Random(f"mgm-joint/{seed}")
    encode = ConversationEncoder(tokenizer)
    weights = token_weights(tokenizer, TEXT_WEIGHT)
    pad = int(model.config.pad_token_id or 0)
    low_side = model.model.vision_tower.config.image_size

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = sampler()
        with torch.no_grad():
            images_aux = normalised(scenes.pixels[rows])
            high = model.model.vision_tower_aux(images_aux)
            low = model.model.vision_tower(low_resolution(images_aux, low_side))
        visual = model.model.mine_and_project(low, high)
        conversations = pad_batch([encode(_rounds(scenes.items[row], rng, rounds)) for row in rows], pad)
        answers, text_accuracy = answer_loss(model, conversations, visual, weights)
        cells, slot_accuracy = cell_head.loss(
            visual, torch.from_numpy(scenes.slots[rows]), torch.from_numpy(scenes.cells[rows])
        )
        loss = answers + CELL_WEIGHT * cells
        return loss, {"answers": float(answers.detach()), "text tokens": text_accuracy, "slots": slot_accuracy}

    modules: Sequence[nn.Module] = (model, cell_head)
    optimise(phase, modules, step_loss, steps=steps, lr=lr, report=report)


def _rounds(items: tuple[Item, Item], rng: random.Random, n: int) -> list[Round]:
    return base_rounds(Scene(0, "pretrain", items, 0), rng, n)
