"""The groups ``model`` and ``adapter``: what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mgm_exp.config.as_json import plain
from mgm_exp.config.choices import AdapterInit, AdapterKind, Attention, Mining, ModelFamily

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
    # HD mode: g x g crops for the low-resolution tower, and a view of the whole image beside them; an image becomes
    # 576 (g * g [+ 1]) tokens. More detail for about five times the tokens (g = 2). null: obey config.json (1 to 8).
    image_grid: int | None = None
    image_global: bool | None = None
    # Side of the high-resolution image in pixels, a multiple of 32; memory of mining grows with its square. null: obey.
    image_size_aux: int | None = None
    # Recomputes activations in the backward pass: about a third more compute for several GB less memory. A number: of
    # the first so many blocks of the LLM (and of mining). auto: of as few as fit into the GPU's memory, by the plan.
    gradient_checkpointing: Any = False  # true, false, a number or auto: OmegaConf cannot merge such a union
    # How patch info mining is computed; the results differ in rounding. native: no joined map, no keys and values of
    # all its pixels: a fiftieth of the operations, a tenth of the memory. reference: the official operations.
    mining: Mining = Mining.native
    # mgm: Mini-Gemini. hf: any image-text-to-text model of transformers (model=hf), which has no align stage.
    family: ModelFamily = ModelFamily.mgm
    # Of model=hf with adapter=full: the connector between vision tower and LLM is trained too, at train.projector_lr.
    train_connector: bool = False


@dataclass
class AdaLoraConfig:
    """How AdaLoRA shares out rank: from ``initial_rank`` everywhere to ``adapter.rank`` on average."""

    # Rank that every layer begins with; above adapter.rank, or there is nothing to share out.
    initial_rank: int = 12
    # Share of the steps before the first rank is taken away. More: importance is known better, less time to adapt.
    warmup_share: float = 0.1
    # Share of the steps at the end in which the ranks stay as they are.
    final_share: float = 0.3
    # Steps between two decisions.
    every_steps: int = 1
    # Weight of the penalty that keeps the factors orthogonal, so that singular values can be compared. 0: none.
    orthogonality: float = 0.1


@dataclass
class AdapterConfig:
    """How the language model is trained in the instruct stage."""

    name: str = MISSING
    kind: AdapterKind = MISSING
    # Rank of the update: more rank, more capacity and memory. bottleneck: its width.
    rank: int = 0
    # The update is scaled by alpha / rank.
    alpha: float = 0
    dropout: float = 0.0
    # Linear layers of every LLM block that get an update: any of q, k, v, o, gate, up, down (with _proj).
    target_modules: list[str] = field(default_factory=list)
    # lora: scales by alpha / sqrt(rank), so that high ranks keep learning.
    use_rslora: bool = False
    # lora: learns the length of each output's weights beside their direction. Slower by about half.
    use_dora: bool = False
    # lora: what it starts from.
    init: AdapterInit = AdapterInit.zero
    # lora, init=pissa: iterations of a randomised SVD (seconds; 16 is nearly exact). 0: exact, minutes for 2 B.
    pissa_iterations: int = 0
    # lora: learning rate of B as a multiple of A's.
    b_lr_ratio: float = 1.0
    # lora: 4 keeps the LLM's linear layers in 4 bits while training (bitsandbytes, GPU): a quarter of their memory.
    base_bits: int = 16
    # prompt, prefix: learnt virtual tokens in front of every sequence.
    tokens: int = 0
    # bitfit: trains the norms' weights beside the biases (Gemma and Llama have norms and no biases).
    norms: bool = False
    adalora: AdaLoraConfig = field(default_factory=AdaLoraConfig)


# What each kind reads. Anything else must stay at its default: a switch that does nothing is an error.
READS: dict[AdapterKind, tuple[str, ...]] = {
    AdapterKind.full: (),
    AdapterKind.lora: (
        *("rank", "alpha", "dropout", "target_modules"),
        *("use_rslora", "use_dora", "init", "pissa_iterations", "b_lr_ratio", "base_bits"),
    ),
    AdapterKind.adalora: ("rank", "alpha", "dropout", "target_modules", "adalora"),
    AdapterKind.loha: ("rank", "alpha", "target_modules"),
    AdapterKind.vera: ("rank", "dropout", "target_modules"),
    AdapterKind.prompt: ("tokens",),
    AdapterKind.prefix: ("tokens",),
    AdapterKind.bottleneck: ("rank", "target_modules"),
    AdapterKind.bitfit: ("norms",),
}
# Where a bottleneck may stand: behind a sublayer, in front of its residual sum.
BOTTLENECK_PLACES = ("o_proj", "down_proj")


def adapter_key(adapter: AdapterConfig) -> dict[str, Any]:
    """What of an adapter's settings changes a trained model: those its kind reads, without its name.

    Settings that came later are left out at their default, so that a stage keeps its key.
    """
    values = plain(adapter)
    default = plain(AdapterConfig("", adapter.kind))
    always = ("kind", "rank", "alpha", "dropout", "target_modules")
    kept = {key: values[key] for key in always}
    kept["target_modules"] = sorted(kept["target_modules"])
    for key in READS[adapter.kind]:
        if key == "adalora" or (key not in always and values[key] != default[key]):
            kept[key] = values[key]
    return kept
