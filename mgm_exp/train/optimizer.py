"""AdamW over groups: what the LLM learns (adapter or weights), the connector and the towers at rates of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mgm_exp.train.job import StageSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import AdamW


def parameter_groups(
    trainable: Mapping[str, nn.Parameter],
    connector: Collection[str],
    settings: StageSettings,
    *,
    towers: Collection[str] = (),
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups in a fixed order, each with its ``group`` name and ``peak_lr``.

    Norms and biases (tensors with fewer than two dimensions) are not decayed, as in transformers' Trainer; without
    weight decay that distinction makes no groups.

    Args:
        trainable: Name -> parameter of all that is trained.
        connector: Names among them of projector and mining.
        settings: Learning rates and weight decay.
        towers: Names among them of the vision towers.
        rates: Name -> multiple of the LLM group's rate, where it is not 1 (LoRA+); each multiple is a group.
    """
    groups: list[dict[str, Any]] = []
    own = {**dict.fromkeys(connector, 1.0), **dict.fromkeys(towers, 1.0)}
    faster = {name: ratio for name, ratio in (rates or {}).items() if name in trainable and name not in own}
    parts = [("llm", settings.lr, [name for name in trainable if name not in own and name not in faster])]
    parts += [
        (f"llm_x{ratio:g}", settings.lr * ratio, [name for name in trainable if faster.get(name) == ratio])
        for ratio in sorted(set(faster.values()))
    ]
    parts += [
        ("connector", settings.connector_lr, [name for name in trainable if name in connector]),
        ("towers", settings.vision_tower_lr, [name for name in trainable if name in towers]),
    ]
    for group, lr, names in parts:
        is_split = settings.weight_decay > 0
        decayed = [name for name in names if not is_split or trainable[name].dim() >= 2]
        plain = [name for name in names if is_split and trainable[name].dim() < 2]
        for part, decay in ((decayed, settings.weight_decay), (plain, 0.0)):
            if part:
                groups.append(
                    {
                        "params": [trainable[name] for name in part],
                        "lr": lr,
                        "peak_lr": lr,
                        "group": group,
                        "weight_decay": decay,
                    }
                )
    return groups


def build_optimizer(groups: list[dict[str, Any]], settings: StageSettings) -> AdamW:
    """torch's AdamW (Loshchilov & Hutter, arXiv 1711.05101); epsilon 1e-8."""
    from torch.optim import AdamW

    return AdamW(groups, betas=settings.betas, eps=1e-8)


# Numbers of a group up to which it is updated at once: this many are in a temporary copy then.
_AT_ONCE = 2**22


def update_at_once(groups: list[dict[str, Any]]) -> None:
    """Lets AdamW update a group of small tensors on the CPU by one call for each operation.

    By itself torch takes one tensor after another there. The same bits in fp32 and fp64 (others keep torch's way),
    in a third of the time for the 56 tensors of a small LoRA.
    """
    for group in groups:
        given = group["params"]
        is_small = sum(parameter.numel() for parameter in given) <= _AT_ONCE
        is_usual = all(p.device.type == "cpu" and p.dtype.itemsize >= 4 for p in given)
        if is_small and is_usual and not group.get("fused"):
            group["foreach"] = True


def set_learning_rates(groups: list[dict[str, Any]], factor: float) -> None:
    """Sets every group's rate to ``factor`` of its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    """Group name -> learning rate."""
    return {group["group"]: group["lr"] for group in groups}
