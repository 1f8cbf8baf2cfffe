"""BERTScore by an encoder in a local folder: no idf weights, no rescaling, nothing downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 64


def bertscore(
    predictions: Sequence[str], references: Sequence[Sequence[str]], folder: Path, layer: int, device: str = "cpu"
) -> float:
    """Mean F1 of greedily matched token embeddings, best over each prediction's references.

    Args:
        predictions: One text for each item.
        references: Reference texts of each item.
        folder: Encoder and tokenizer in transformers format.
        layer: Hidden layer whose outputs are compared; 1 is the first block's.
        device: Where the encoder runs.

    Raises:
        ModelError: the folder is no encoder, or has fewer layers.

    Source: Zhang et al. 2020, and their package bert-score (``greedy_cos_idf`` with ``idf=False``): the special tokens
    may be matched, but carry no weight themselves.
    """
    embeddings = _embed(
        sorted({*predictions, *(text for texts in references for text in texts)}), folder, layer, device
    )
    best = (
        max(_f1(embeddings[text], embeddings[other]) for other in texts)
        for text, texts in zip(predictions, references, strict=True)
    )
    scores = list(best)
    return sum(scores) / len(scores)


def _f1(given: Tensor, wanted: Tensor) -> float:
    """(tokens, hidden) each, of length 1; the first and last are special tokens."""
    if len(given) <= 2 or len(wanted) <= 2:
        return 0.0
    similarity = given @ wanted.T
    precision = similarity[1:-1].max(dim=1).values.mean().item()
    recall = similarity[:, 1:-1].max(dim=0).values.mean().item()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _embed(texts: Sequence[str], folder: Path, layer: int, device: str) -> dict[str, Tensor]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from mgm_exp.errors import ModelError

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"eval.captions.bertscore={folder} cannot be loaded: {str(error)[:200]}",
            advice="Give a local folder with an encoder, its tokenizer and safetensors weights.",
        ) from error
    n_layers = model.config.num_hidden_layers
    if not 1 <= layer <= n_layers:
        raise ModelError(f"eval.captions.bertscore_layer={layer}, but the encoder in {folder} has {n_layers} layers.")
    model.to(device).eval()
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(texts), _BATCH):
            some = [text.strip() for text in texts[start : start + _BATCH]]
            inputs = tokenizer(some, padding=True, truncation=True, return_tensors="pt").to(device)
            states = model(**inputs, output_hidden_states=True).hidden_states[layer].float()
            states = torch.nn.functional.normalize(states, dim=-1)
            for place, mask in enumerate(inputs["attention_mask"].bool()):
                found[texts[start + place]] = states[place][mask].cpu()
    return found
