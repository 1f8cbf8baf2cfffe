"""What frozen towers see of an image, as it is kept and taken up again: three depths, and how many bytes each has.

    found = features_of(model, "towers", images, images_aux)     # one dictionary of tensors an image
    tokens = tokens_of(model.model, stacked(found), None, None)  # the same bits as of pixels

============ ======================================================= ===================================
tier         kept of an image                                        computed in every step
============ ======================================================= ===================================
``clip``     ``low`` ([views,] n², C)                                ConvNeXt, mining, projector
``towers``   ``low``, and ``high_i`` (H_i, W_i, D_i) of each stage   mining, projector
``tokens``   ``tokens`` (N, hidden)                                  nothing
============ ======================================================= ===================================

Maps are kept channels-last, as the tower makes them: mining takes the stages, or joins them first (the official form).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.model import resident

LOW, HIGH, TOKENS, ORDER = "low", "high_", "tokens", "order"
TIERS = ("clip", "towers", "tokens")
_MARK = "sha256_of_tensors"


def features_of(body: Any, tier: str, images: Tensor, images_aux: Tensor) -> list[dict[str, Tensor]]:
    """What is kept of each image of a batch; call it as training calls the model (autocast, device).

    Args:
        body: `MGMModel`, its towers frozen; for ``tokens`` its connector, too.
        images, images_aux: (B, [views,] 3, h, w) and (B, 3, H, W).
    """
    with torch.no_grad():
        if tier == TOKENS:
            return _rows({TOKENS: body.encode_images(images, images_aux)})
        kept = {LOW: body.see_low(images)}
        if tier == "towers":
            maps = body.vision_tower_aux(images_aux, joined=False)
            kept |= {f"{HIGH}{i}": stage.permute(0, 2, 3, 1) for i, stage in enumerate(maps)}
        return _rows(kept)


def _rows(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    count = len(next(iter(batch.values())))
    return [{name: tensor[i].contiguous() for name, tensor in batch.items()} for i in range(count)]


def tokens_of(body: Any, seen: Mapping[str, Tensor], images: Any, images_aux: Any) -> Tensor:
    """Visual tokens (B, N, hidden) of images of which some or all have features.

    Args:
        body: `MGMModel`.
        seen: The features, stacked over the k images that have them. Where some have none: ``order`` (B,), the place of
            each image among those with features followed by those without.
        images, images_aux: Pixels of the images without features, filled up to B images: the size of a batch belongs
            to the bits. For ``clip`` the ``images_aux`` are those of all images, in their order. None: all have some.
    """
    order = seen.get(ORDER)
    if TOKENS in seen:
        fresh = None if order is None else [body.encode_images(images, images_aux)]
        return _completed([seen[TOKENS]], order, fresh)[0]
    maps = [seen[name] for name in sorted(name for name in seen if name.startswith(HIGH))]
    with torch.no_grad():
        fresh = None
        if order is not None:
            fresh = [body.see_low(images)]
            if maps:
                fresh += [stage.permute(0, 2, 3, 1) for stage in body.vision_tower_aux(images_aux, joined=False)]
        low, *stages = _completed([seen[LOW], *maps], order, fresh)
    if maps:
        return body.encode_seen(low, [stage.permute(0, 3, 1, 2) for stage in stages])
    return body.encode_seen(low, body.see_high(images_aux))


def _completed(kept: list[Tensor], order: Tensor | None, fresh: list[Tensor] | None) -> list[Tensor]:
    if order is None or fresh is None:
        return kept
    missing = len(order) - len(kept[0])
    return [torch.cat([one, new[:missing]])[order] for one, new in zip(kept, fresh, strict=True)]


def bytes_of_tier(
    tier: str,
    *,
    low: tuple[int, int],
    map_side: int,
    map_widths: Sequence[int],
    tokens: tuple[int, int],
    itemsize: int,
) -> int:
    """Bytes of an image's features, at most: under autocast some tensors are half as large.

    Args:
        low: Patches of all views, and their width.
        map_side: Side of the first ConvNeXt stage; each further one has half of it.
        map_widths: Channels of each stage.
        tokens: Visual tokens, and their width.
        itemsize: Bytes of a number: 4 in fp32 and under autocast, else 2.
    """
    if tier == TOKENS:
        return tokens[0] * tokens[1] * itemsize
    numbers = low[0] * low[1]
    if tier == "towers":
        numbers += sum((map_side >> i) ** 2 * width for i, width in enumerate(map_widths))
    return numbers * itemsize


def tensors_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's tensors, by name; remembered on the module until one of them is written to, and
    with the base model whose tensors they are.
    """
    tensors = module.state_dict()
    state = [(tensor.data_ptr(), tensor._version) for tensor in tensors.values()]
    known = vars(module).get(_MARK)
    if known is None or known[0] != state:
        known = state, resident.digest_of(tensors, lambda: sha256_of(tensors))
        vars(module)[_MARK] = known
    return str(known[1])


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {list(flat.shape)}\n".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def depends_on_place(
    images: Tensor,
    images_aux: Tensor,
    run: Callable[[Tensor, Tensor], Any],
    here: Sequence[Mapping[str, Tensor]] | None = None,
) -> bool:
    """Whether an image's features have other bits in another place of a batch: then keeping them changes results.

    Args:
        images, images_aux: A batch, of which the images differ.
        run: Gives the features of such a batch, one dictionary an image.
        here: Those of this batch, or of its first images; None: they are made.
    """
    here = run(images, images_aux) if here is None else here
    turned = [tensor.roll(1, 0) for tensor in (images, images_aux)]
    there = run(*turned)
    there = [*there[1:], there[0]][: len(here)]
    return any(not one[name].equal(other[name]) for one, other in zip(here, there, strict=True) for name in one)
