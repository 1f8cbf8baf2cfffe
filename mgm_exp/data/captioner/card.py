"""The model card of demo-blip2."""

from __future__ import annotations

from typing import Any

_CARD = """---
license: apache-2.0
tags: [blip-2, demo, synthetic]
---
# demo-blip2: the demo's captioner

A {millions:.2f} million parameter model with BLIP-2's architecture (ViT, Q-Former, OPT). **It is not Salesforce's
BLIP-2 and shares no weights with it**: it was trained by this project, from random weights, on generated 128 x 128
pictures of lettered signs, labels, jerseys and price tags, and knows nothing else. For real images give a real BLIP-2
folder: `data.captioner.path=/path/to/blip2-opt-2.7b`; it takes the same code path.

## How it was made
`python -m mgm_exp.data.captioner.make_demo_blip2 --out DIR` (seed {seed}; hardware: 2 CPU cores; torch {torch},
{threads} threads, {capability}):

1. vision model: glyph pages ({page_steps} steps x {page_batch}), scenes with dense labels ({scene_steps} x
   {scene_batch}), both ({mixed_steps} x {mixed_scenes} + {mixed_pages});
2. Q-Former and OPT, vision model frozen: {caption_steps} steps x {caption_batch} captions of {n_scenes} scenes. During
   training 16 of the 20 queries were each told what to look for (the character at a place, kind, colour, shape):
   labels that only a generator can give.

Its training scenes are from a split of their own, half of their texts random characters; the *words* of the demo are
not new to it, the demo's images are. It reads known words partly by knowing them, as real captioners do.

## What it can do
Greedy captions of {n_probe} unseen scenes, through the ordinary BLIP-2 folder (bf16 weights, float32 compute):

| | share right |
|---|---|
{rows}

## Files
`model.safetensors` here holds a word table of 256 rows. The library writes the ordinary folder (50,272 rows, `<image>`
= 50265, as blip2-opt) to a cache on first use. `write_folder(..., sharpness=8)` scales OPT's last layer norm, which
divides the sampling temperature by 8: for Data-Juicer's `image_captioning_mapper`, which always samples.
"""

_NAMES = {
    "kind": "kind of object",
    "colour": "colour",
    "shape": "shape",
    "text": "text, exact",
    "order": "which is above",
    "whole": "everything",
}


def captioner_card(record: dict[str, Any], n_parameters: int) -> str:
    """Markdown for `README.md` from the content of `recipe.json`."""
    measures, made = record["measures"], record["made_with"]
    return _CARD.format(
        millions=n_parameters / 1e6,
        torch=made["torch"],
        threads=made["threads"],
        capability=made["cpu_capability"],
        n_probe=measures["n_probe"],
        rows="\n".join(f"| {name} | {measures['captions'].get(key, 0.0):.3f} |" for key, name in _NAMES.items()),
        **{k: v for k, v in record["recipe"].items() if k != "n_probe"},
    )
