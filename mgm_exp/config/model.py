"""The groups ``model`` and ``adapter``: what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from mgm_exp.config.choices import AdapterKind, Attention, ModelFamily

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class ModelConfig:
    """Which model, from where."""

    name: str = MISSING
    # Folder of the checkpoint (official tensor names, safetensors). null: the tiny base that is shipped.
    path: str | None = None
    # Folders of the towers when they are not inside the checkpoint.
    vision_tower: str | None = None
    vision_tower_aux: str | None = None
    attn_implementation: Attention = Attention.auto
    # null: obey the checkpoint's config.json; MGM-2B was trained with gelu_pytorch_tanh.
    hidden_activation: str | None = None
    # Recomputes activations in the backward pass: about a third more compute for several GB less memory.
    gradient_checkpointing: bool = False
    # mgm: Mini-Gemini. hf: any image-text-to-text model of transformers (model=hf), which has no align stage.
    family: ModelFamily = ModelFamily.mgm
    # Of model=hf with adapter=full: the connector between vision tower and LLM is trained too, at train.projector_lr.
    train_connector: bool = False


@dataclass
class AdapterConfig:
    """How the language model is trained in the instruct stage."""

    name: str = MISSING
    kind: AdapterKind = MISSING
    # Rank of the update: more rank, more capacity and memory.
    rank: int = 0
    # The update is scaled by alpha / rank.
    alpha: float = 0
    dropout: float = 0.0
    # Linear layers of every LLM block that get an update: any of q, k, v, o, gate, up, down (with _proj).
    target_modules: list[str] = field(default_factory=list)
