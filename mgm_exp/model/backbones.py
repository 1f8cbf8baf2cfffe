"""The language models that MGM was built on: what tells them apart, in one place. Imports nothing heavy.

| | Gemma (MGM-2B) | Llama (MGM-7B, 8B, 13B) |
| --- | --- | --- |
| embeddings | all of them times sqrt(hidden), text and image | as they are |
| RMSNorm | multiplies by (1 + weight) | by weight |
| head | tied to the embeddings, `lm_head.weight` in no file | a tensor of its own |
| MLP | gelu (which one: `hidden_activation`) | silu |
| heads of keys | 1 (multi-query), `head_dim` stated | as many as of queries (Vicuna), 8 (Llama 3) |
| templates | `gemma` | `vicuna_v1` or `llama_3`, told by the tokenizer: see `mgm_exp.model.templates` |
| padding token | the tokenizer's own | its unknown one; Llama 3 has none and takes its first reserved token |

The first four rows are done by transformers' own classes (`mgm_exp.model.mgm`); widths, heads, rotary base and
vocabulary come from the folder's `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """A kind of language model.

    Attributes:
        name: as `MGMConfig.backbone` has it.
        model_types: of complete MGM folders; the first is the one that is written, others are of older releases.
        plain: `model_type` of the language model alone, which stage 1 can start from.
        official_class: the official code's class, for `architectures`.
        templates: names of the conversation templates that it can have.
        pads_with_unknown: the official code makes the unknown token the padding token.
    """

    name: str
    model_types: tuple[str, ...]
    plain: str
    official_class: str
    templates: tuple[str, ...]
    pads_with_unknown: bool


GEMMA = Backbone("gemma", ("mgm_gemma", "mini_gemini_gemma"), "gemma", "MGMGemmaForCausalLM", ("gemma",), False)
LLAMA = Backbone("llama", ("mgm", "mini_gemini"), "llama", "MGMLlamaForCausalLM", ("llama_3", "vicuna_v1"), True)
BACKBONES = {backbone.name: backbone for backbone in (GEMMA, LLAMA)}
MODEL_TYPES = tuple(kind for backbone in BACKBONES.values() for kind in (*backbone.model_types, backbone.plain))


def backbone_of_type(model_type: str | None) -> Backbone | None:
    """The backbone of a folder by its `model_type`; None: not one of these."""
    return next((b for b in BACKBONES.values() if model_type in (*b.model_types, b.plain)), None)
