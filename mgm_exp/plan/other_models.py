"""The sizes of a model of transformers, put as the planner knows MGM: a language model, a tower, a connector.

Every tensor is counted on the meta device. Its language model must have Llama's seven linear layers, whose memory the
planner follows; a model of another build is refused. The vision tower and the connector are taken more coarsely.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mgm_exp.errors import ModelError
from mgm_exp.model.layout import LlmLayout
from mgm_exp.plan.architecture import Architecture

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOTE = (
    "model=hf: parameters are exact; memory and compute of the vision tower and the connector while they run are left "
    "out, and logits are counted for all learnt positions at once"
)


@lru_cache(maxsize=8)
def sizes_of_other(path: str, stamp: int) -> Architecture:
    """
    Args:
        path: Folder with ``config.json`` (and the processor's files, for the number of image tokens).
        stamp: Changes when the description does.

    Raises:
        ModelError: it is no model that can be planned; says why.
    """
    from mgm_exp.model.hf.loading import meta_model
    from mgm_exp.model.hf.parts import parts_of

    folder = Path(path)
    model: Any = meta_model(folder)
    parts = parts_of(model)
    text = model.config.get_text_config()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if name in parts.connector:
            renamed = f"model.mm_projector.{name}"
        elif name in parts.llm:
            renamed = f"model.{name.removeprefix(parts.text)}"
        else:
            renamed = f"model.vision_tower.{name}"
        shapes[renamed] = tuple(parameter.shape)
    block = [key for key in shapes if key.startswith("model.layers.0.")]
    missing = [name for name in _LINEARS if not any(f".{name}." in key for key in block)]
    if missing:
        raise ModelError(
            f"{folder}: a block of its language model has no {', '.join(missing)}, through which memory is followed, "
            f"so it cannot be planned. The model has {sum(parts.parameters.values()):,} parameters.",
            advice="Begin with a small train.micro_batch_size and read peak_memory_gib in result.json.",
        )
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    tokens, source = image_tokens(folder)
    return Architecture(
        shapes=shapes,
        hidden=int(text.hidden_size),
        mlp=int(text.intermediate_size),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=int(text.vocab_size),
        visual_tokens=tokens,
        clip_width=0,
        clip_mlp=0,
        clip_layers=0,
        clip_tokens=0,
        grid=1,
        has_global=False,
        map_side=0,
        map_widths=(1,),
        map_depths=(0,),
        note=f"{NOTE}; {source}",
        llm=_layout(_of_llm(shapes), int(text.hidden_size), kv_heads, head_dim),
        tunable=(0, 0),
        clip_tuned=0,
        is_head_whole=True,
    )


def _of_llm(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    others = ("model.mm_projector.", "model.vision_tower.")
    return {name: shape for name, shape in shapes.items() if not name.startswith(others)}


def _of_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    outputs, inputs = shape
    return outputs, inputs


def _layout(shapes: dict[str, tuple[int, ...]], hidden: int, kv_heads: int, head_dim: int) -> LlmLayout:
    """The layout of a language model with Llama's seven linears, whatever else lies in its blocks."""
    first = "model.layers.0."
    linears = {
        name: key.removeprefix(first).removesuffix(".weight")
        for name in _LINEARS
        for key in shapes
        if key.startswith(first) and key.endswith(f"{name}.weight")
    }
    norms = tuple(
        key.removeprefix(first).removesuffix(".weight")
        for key, shape in shapes.items()
        if key.startswith(first) and key.endswith(".weight") and shape == (hidden,)
    )
    layout = LlmLayout(
        blocks="model.layers",
        n_blocks=len({key.split(".")[2] for key in shapes if key.startswith("model.layers.")}),
        body="model",
        linears=linears,
        shapes={name: _of_matrix(shapes[f"{first}{place}.weight"]) for name, place in linears.items()},
        biased=tuple(name for name, place in linears.items() if f"{first}{place}.bias" in shapes),
        norms=norms,
        outside={},
        final_norms=(),
        hidden=hidden,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    regular = layout.names()
    return replace(layout, outside={name: shape for name, shape in shapes.items() if name not in regular})


def image_tokens(folder: Path) -> tuple[int, str]:
    """Tokens that an image of 640 x 480 becomes, and where that is known from.

    Raises:
        ModelError: the processor cannot be read and ``config.json`` does not say it.
    """
    from mgm_exp.model.hf.loading import open_processor

    size = (640, 480)
    try:
        processor = open_processor(folder)
    except ModelError as error:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("image_seq_length")
        if not isinstance(stated, int):
            raise ModelError(
                f"How many tokens an image becomes is not known: {error.message}",
                advice="Put the processor's files beside config.json.",
            ) from error
        return stated, f"{stated} tokens an image, as config.json says"
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "No."}]
    text_alone = len(processor.dialect.conversation(asked, True).ids)
    tokens = processor.measure(asked, size)[0] - text_alone + 1
    return tokens, f"{tokens} tokens for an image of 640 x 480 (other sizes may have others)"
