"""PiSSA (Meng et al., arXiv 2404.02948): LoRA that starts from the principal part of the weights.

W = U S V^T gives B0 = U_r sqrt(S_r / s), A0 = sqrt(S_r / s) V_r^T; what is left, W - s B0 A0, is frozen. The result is
saved over the original base, as the plain LoRA of twice the rank that has the same update: [B, -B0] [A; A0].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.model.loading import seeded_uniform
from mgm_exp.model.resident import own


@torch.no_grad()
def start_from_principal_part(
    parameters: Mapping[str, nn.Parameter],
    places: Iterable[str],
    rank: int,
    scale: float,
    iterations: int,
    seed: int,
) -> dict[str, Tensor]:
    """Moves the principal part of each weight into its factors.

    Args:
        parameters: By official name; factors and weights are changed.
        places: Modules with factors.
        iterations: Of a randomised SVD (Halko et al., arXiv 0909.4061); 0: the exact one.

    Returns:
        The factors as they begin, by official name, on the CPU.
    """
    began: dict[str, Tensor] = {}
    places = list(places)
    own(parameters[f"{place}.weight"] for place in places)
    for place in places:
        weight = parameters[f"{place}.weight"]
        whole = weight.float()
        left, values, right = _principal(whole, rank, iterations, seed, place)
        root = (values / scale).sqrt()
        factors = {f"{place}.lora_A.weight": root[:, None] * right, f"{place}.lora_B.weight": left * root}
        for name, factor in factors.items():
            parameters[name].data = factor.contiguous()
            began[name] = factor.cpu().clone()
        down, up = factors.values()
        weight.copy_(whole.addmm(up, down, alpha=-scale))
    return began


def _principal(weight: Tensor, rank: int, iterations: int, seed: int, place: str) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, r), (r,), (r, inputs): the largest singular values and their vectors."""
    if not iterations:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    # A subspace somewhat wider than the rank, from values that are the same on every machine
    wide = min(rank + 8, *weight.shape)
    basis = seeded_uniform((weight.shape[1], wide), 1.0, seed, f"{place}.pissa").to(weight.device)
    for _ in range(iterations):
        basis = torch.linalg.qr(weight.t() @ torch.linalg.qr(weight @ basis).Q).Q
    left, values, small = torch.linalg.svd(weight @ basis, full_matrices=False)
    return left[:, :rank], values[:rank], (small @ basis.t())[:rank]


def as_plain_lora(
    stated: Mapping[str, Any], state: Mapping[str, Tensor], began: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The trained factors as a LoRA over the original base: twice the rank, the same scale."""
    tensors = {
        name: torch.cat([tensor.cpu(), began[name]], 0)
        if ".lora_A." in name
        else torch.cat([tensor.cpu(), -began[name]], 1)
        for name, tensor in state.items()
    }
    growth = math.sqrt(2) if stated["use_rslora"] else 2
    return {**stated, "r": 2 * stated["r"], "lora_alpha": growth * stated["lora_alpha"]}, tensors
