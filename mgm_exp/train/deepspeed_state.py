"""ZeRO's sharded state in a full form, by name: that of plain PyTorch, so that either continues what the other began.

DeepSpeed's own checkpoint files are pickles that fit one number of processes. Here every tensor is put together from
its shards, one at a time, and taken apart again for as many processes as there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.train.ranks import Ranks

# What AdamW keeps of each element.
MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def gathered_state(
    optimizer: Any, trainable: Mapping[str, nn.Parameter], ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights in full precision, and optimizer state as ``exp_avg/NAME``, ...; called by all processes.

    Args:
        optimizer: DeepSpeed's, around AdamW.

    Returns:
        Both on the host and only on the first process; empty on the others.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link(optimizer)
    weights: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    steps = [state["step"] for state in optimizer.optimizer.state.values() if "step" in state]
    for name, parameter in trainable.items():
        parts = {"": safe_get_full_fp32_param(parameter)}
        if steps:
            parts |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        if not ranks.is_first:
            continue
        for key, value in parts.items():
            whole = value.detach().to("cpu", torch.float32, copy=True).contiguous()
            (states if key else weights)[f"{key}/{name}" if key else name] = whole
        if steps:
            states[f"step/{name}"] = torch.as_tensor(float(steps[0]), dtype=torch.float32)
    return weights, states


def scatter_state(
    optimizer: Any, trainable: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], states: Mapping[str, Tensor]
) -> None:
    """Takes the full form apart for this process; called by all processes with the same tensors."""
    steps = max((float(value) for key, value in states.items() if key.startswith("step/")), default=0.0)
    for flat in _flat_groups(optimizer):
        state = optimizer.optimizer.state[flat]
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(flat))
        # As torch's AdamW has it: a tensor on the host, but for the fused one
        before = state.get("step")
        state["step"] = torch.full_like(before, steps) if isinstance(before, Tensor) else torch.tensor(steps)
    _link(optimizer)
    for name, parameter in trainable.items():
        _set(parameter, weights[name], None)
        _set_low_precision(parameter, weights[name])
        for key in MOMENTS:
            # A tensor that never had a gradient has no state in plain PyTorch; in a shared shard it is zero
            value = states.get(f"{key}/{name}")
            _set(parameter, torch.zeros_like(weights[name]) if value is None else value, key)


def _flat_groups(optimizer: Any) -> list[Tensor]:
    """This process's shards in full precision, one tensor a group: what the AdamW inside works on."""
    found = getattr(optimizer, "single_partition_of_fp32_groups", None)  # ZeRO-2
    return list(optimizer.fp32_partitioned_groups_flat if found is None else found)


def _link(optimizer: Any) -> None:
    """Tells each parameter under ZeRO-2 where its moments lie.

    DeepSpeed does so after the step of its first group, when the others have none yet, and never again.
    """
    if not hasattr(optimizer, "single_partition_of_fp32_groups"):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)


def _set(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    device = parameter.device
    if not hasattr(parameter, "ds_id"):  # ZeRO-2
        if key is None:
            safe_set_full_fp32_param(parameter, value.to(device))
        else:
            safe_set_full_optimizer_state(parameter, value.to(device), key)
        return
    import torch.distributed as dist

    # ZeRO-3 pads a tensor to equal shards; the padding is never read
    size = parameter.partition_numel()  # type: ignore[attr-defined]
    padded = torch.zeros(size * dist.get_world_size(), dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    shard = padded.narrow(0, size * dist.get_rank(), size).to(device)
    if key is None:
        safe_set_local_fp32_param(parameter, shard)
    else:
        safe_set_local_optimizer_state(parameter, shard, key)


def _set_low_precision(parameter: nn.Parameter, value: Tensor) -> None:
    """The weights that are computed with: those of full precision, rounded."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(value)


def scaler_state(optimizer: Any) -> dict[str, float]:
    """The dynamic loss scale of fp16, as plain numbers; empty in other precisions."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}


def put_scaler_state(optimizer: Any, state: Mapping[str, float]) -> None:
    """Puts back what :func:`scaler_state` gave."""
    for key, value in state.items():
        setattr(optimizer.loss_scaler, key, value)
