"""The model card of the tiny base."""

from __future__ import annotations

from typing import Any

_CARD = """---
license: apache-2.0
tags: [mgm, demo, synthetic]
---
# tiny-mgm: the demo's base model

A complete MGM (Mini-Gemini architecture: Gemma-style LLM, CLIP-style and ConvNeXt-style vision tower, patch info
mining, projector) of {millions:.2f} million parameters. **It is a demo.** It was trained by this project, from random
weights, on generated 128 x 128 pictures of lettered signs, labels, jerseys and price tags. It knows nothing else,
shares no weights with MGM-2B, Gemma, CLIP or ConvNeXt, and its scores say nothing about them.

## How it was made
`python -m mgm_exp.train.make_tiny --out DIR` (seed {seed}, {steps} steps in all; hardware: 2 CPU cores; torch {torch},
{threads} threads, {capability}):

1. glyph pages, ConvNeXt tower: {page_steps} steps x {page_batch};
2. scenes with dense labels, both towers: {scene_steps} steps x {scene_batch};
3. captions and requests, towers frozen: {joint_steps} steps x {joint_batch} pictures x {rounds} requests.

Heads of phases 1 and 2 and the auxiliary head of phase 3 are not part of the model. Mining and projector are kept
(a run may start them anew: `train.align.reset`). Pictures come from a split of their own: no scene of the demo's
training, validation or test set was seen. The *words* on the demo's signs and labels were: half of the texts were
demo words, half random characters.

## What it can do
Measured on {n_probe} unseen scenes with the shipped bf16 weights, greedy:

| | share right |
|---|---|
{rows}

It was never asked a question in the demo's wording, so the untouched base fails the demo's questions; that, and not
blindness, is what a short training repairs.
"""

_NAMES = {
    "kind": "captions: kind of object",
    "colour": "captions: colour",
    "shape": "captions: shape",
    "text": "captions: text, exact",
    "order": "captions: which is above",
    "whole": "captions: everything",
}


def base_card(record: dict[str, Any], n_parameters: int) -> str:
    """Markdown for `README.md` from the content of `recipe.json`."""
    recipe, measures, made = record["recipe"], record["measures"], record["made_with"]
    shares = {name: measures["captions"][key] for key, name in _NAMES.items()}
    shares['"read the upper / lower one": text, exact'] = measures["reading"]
    return _CARD.format(
        millions=n_parameters / 1e6,
        steps=recipe["page_steps"] + recipe["scene_steps"] + recipe["joint_steps"],
        torch=made["torch"],
        threads=made["threads"],
        capability=made["cpu_capability"],
        n_probe=measures["n_probe"],
        rows="\n".join(f"| {name} | {share:.3f} |" for name, share in shares.items()),
        **{
            k: recipe[k]
            for k in (
                "seed",
                "page_steps",
                "page_batch",
                "scene_steps",
                "scene_batch",
                "joint_steps",
                "joint_batch",
                "rounds",
            )
        },
    )
