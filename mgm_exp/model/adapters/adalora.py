"""AdaLoRA (Zhang et al., arXiv 2303.10512): singular values that are given to the layers that need them.

W + s B diag(E) A / r0. Every layer begins with rank r0; where loss x weight says a triplet matters least, its E is set
to zero, until the average rank is the one that is asked for. A penalty keeps A and B orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import AdaLoraConfig as Section
from mgm_exp.config import AdapterKind
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.adapters.base import (
    ADVICE,
    Adapter,
    Cost,
    MergedWeights,
    Shapes,
    by_official_name,
    check_parts,
    copy_exactly,
    inject,
    peft_config,
    split_by_module,
    start,
    stated_config,
)
from mgm_exp.model.layout import LlmLayout

_PARTS = ("lora_A", "lora_B", "lora_E")
# As PEFT divides: by the number of singular values and this.
_EPSILON = 1e-5


class AdaLora(Adapter):
    """Low-rank updates whose ranks are shared out while training; see :class:`RankSharing`."""

    kind = AdapterKind.adalora
    peft_type = "ADALORA"

    def added(self, llm: LlmLayout) -> Shapes:
        rank, found = self.section.adalora.initial_rank, Shapes()
        for place, (outputs, inputs) in llm.places(self.section.target_modules).items():
            found[f"{place}.lora_A"] = (rank, inputs)
            found[f"{place}.lora_B"] = (outputs, rank)
            found[f"{place}.lora_E"] = (rank, 1)
        return found

    def patterns(self, llm: LlmLayout) -> list[str]:
        return [llm.targets(self.section.target_modules) + r"\.lora_[ABE]"]

    def late(self, llm: LlmLayout) -> Iterable[str]:
        # While E is zero, A and B move by the penalty alone
        return [name for name in self.added(llm) if not name.endswith("lora_E")]

    def uncertain(self, llm: LlmLayout) -> Iterable[str]:
        return [name for name in self.added(llm) if name.endswith("lora_E")]  # may be set back to zero at once

    def cost(self, llm: LlmLayout) -> Cost:
        return Cost(state=12.0)  # sensitivity, and its two averages, in fp32

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        from peft import AdaLoraConfig

        section = self.section
        config = AdaLoraConfig(
            target_r=section.rank,
            init_r=section.adalora.initial_rank,
            lora_alpha=section.alpha,  # type: ignore[arg-type]
            lora_dropout=section.dropout,
            target_modules=llm.targets(section.target_modules),
            deltaT=section.adalora.every_steps,
            orth_reg_weight=section.adalora.orthogonality,
            task_type="CAUSAL_LM",
            total_step=1,  # RankSharing knows how many there will be
        )
        inject(model, config)
        _fix_numbers(model)
        parameters = by_official_name(model)
        start({name: parameters[name] for name in self.added(llm)}, ["lora_E"], seed)
        self._config = config
        return stated_config(config)

    def to_files(self, stated: dict[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        # As RankSharing completed it
        return super().to_files(stated_config(self._config), state)

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        if stated.get("rank_pattern"):
            raise ModelError("This AdaLoRA adapter has layers of different rank.", advice="Merge it with PEFT.")
        inject(model, peft_config(stated))
        _fix_numbers(model)
        own = {n: p for n, p in by_official_name(model).items() if n.endswith(_PARTS)}
        return copy_exactly(own, tensors, "adapter", widen=True)

    @classmethod
    def merged_weights(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> MergedWeights:
        rank, alpha = stated.get("init_r"), stated.get("lora_alpha")
        if stated.get("rank_pattern") or not isinstance(rank, int) or not isinstance(alpha, (int, float)):
            raise ModelError("adapter_config.json has no usable init_r and lora_alpha.", advice=ADVICE)
        modules = split_by_module(tensors, "lora_")
        check_parts("AdaLoRA", modules, _PARTS, shapes)
        scale = (float(alpha) if alpha > 0 else float(rank)) / (rank + _EPSILON)
        return MergedWeights({f"{module}.weight": parts for module, parts in modules.items()}, scale=scale)

    @classmethod
    def merged(cls, weight: Tensor, parts: Mapping[str, Tensor], merge: MergedWeights) -> Tensor:
        values = parts["lora_A"].float() * parts["lora_E"].float()
        return weight.addmm(parts["lora_B"].float(), values, alpha=merge.scale)


def _fix_numbers(model: nn.Module) -> None:
    """PEFT keeps each layer's number of singular values as a parameter, and trains it on a base of 16 bits."""
    for name, parameter in by_official_name(model).items():
        if name.endswith(".ranknum"):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()


class RankSharing:
    """What AdaLoRA does around every update: the penalty before it, the sharing out of rank after it.

    A pure function of what it has seen, so that all processes decide alike; its state goes into checkpoints.

    Args:
        model: With an AdaLoRA adapter.
        section: When ranks are taken away.
        n_steps: Optimizer steps of the stage.

    Raises:
        ConfigError: too few steps to take anything away.
    """

    def __init__(self, model: nn.Module, section: Section, n_steps: int) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        stated: Any = model.peft_config["default"]  # type: ignore[index]
        stated.total_step, stated.tinit = n_steps, round(section.warmup_share * n_steps)
        stated.tfinal = round(section.final_share * n_steps)
        if stated.tinit >= n_steps - stated.tfinal:
            raise ConfigError(
                f"adapter.kind=adalora takes ranks away between step {stated.tinit} and {n_steps - stated.tfinal} of "
                f"{n_steps}: there are none.",
                advice="Train longer, or lower adapter.adalora.warmup_share and final_share.",
            )
        self._model, self._settings, self._weight = model, stated, section.orthogonality
        self._allocator = RankAllocator(model, stated, "default")
        self._step = 0
        self._kept: dict[str, list[bool]] = {}

    def before_update(self) -> None:
        """Adds the penalty's gradient: mean over A and B of || P P^T - 1 ||, times its weight."""
        if not self._weight:
            return
        factors = [p for n, p in self._model.named_parameters() if n.endswith(("lora_A.default", "lora_B.default"))]
        penalty = torch.zeros((), device=factors[0].device)
        for factor in factors:
            wide = factor if factor.shape[0] <= factor.shape[1] else factor.t()  # (rank, width)
            penalty = penalty + torch.linalg.norm(wide @ wide.t() - torch.eye(len(wide), device=wide.device))
        gradients = torch.autograd.grad(penalty * (self._weight / len(factors)), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    def after_update(self, *, applied: bool) -> None:
        """Called after every optimizer step, while its gradients are still there."""
        self._step += 1
        settings, step = self._settings, self._step
        last = settings.total_step - settings.tfinal
        if step > last and self._kept:
            self._allocator.mask_using_rank_pattern(self._model, self._kept)
        elif applied:
            self._allocator.update_ipt(self._model)
            budget, is_due = self._allocator.budget_schedule(step)
            if step >= last:
                budget, is_due = self._allocator.target_bgt, True
            if is_due and budget < self._allocator.init_bgt:
                self._kept = self._allocator.mask_to_budget(self._model, budget)

    @property
    def ranks(self) -> dict[str, int]:
        """Official module name -> singular values that are left, since the last decision."""
        return {name.removesuffix(".lora_E.default"): sum(kept) for name, kept in self._kept.items()}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors, for a checkpoint."""
        averages = {"sensitivity": self._allocator.exp_avg_ipt, "uncertainty": self._allocator.exp_avg_unc}
        return {"step": self._step, "kept": self._kept}, {
            f"{what}/{name}": tensor for what, named in averages.items() for name, tensor in named.items()
        }

    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._step, self._kept = int(values["step"]), dict(values["kept"])
        homes = {"sensitivity": self._allocator.exp_avg_ipt, "uncertainty": self._allocator.exp_avg_unc}
        parameters = dict(self._model.named_parameters())
        for key, tensor in tensors.items():
            what, _, name = key.partition("/")
            homes[what][name] = tensor.to(parameters[name].device)
            self._allocator.ipt[name] = torch.zeros_like(homes[what][name])  # only its name is asked for
