"""The DeepSpeed engine: ZeRO-2 and ZeRO-3 (Rajbhandari et al., arXiv 1910.02054), optimizer offload included.

Notable:
- the optimizer is torch's own AdamW, so nothing is compiled; on the CPU DeepSpeed's shared-memory extension (an
  inference collective that training never calls) is left out, so that no compiler is needed and no build lock can hang;
- the loss is normalised over the global batch by the caller; DeepSpeed's own averaging is undone;
- a gradient that is not finite leaves weights and optimizer state as they are, in every precision;
- checkpoints hold every tensor whole and by name, as those of plain PyTorch do; DeepSpeed's own pickles are not used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import Offload, Precision, ZeroConfig
from mgm_exp.errors import MissingDependencyError
from mgm_exp.train.deepspeed_state import gathered_state, put_scaler_state, scaler_state, scatter_state
from mgm_exp.train.engine import COMPUTE_DTYPE, Batch, Engine, Snapshot, Update, poisoned_if_not_finite
from mgm_exp.train.guards import Limits
from mgm_exp.train.job import StageSettings
from mgm_exp.train.optimizer import build_optimizer, set_learning_rates
from mgm_exp.train.ranks import Ranks


def check_deepspeed(zero_stage: int) -> None:
    """Raises MissingDependencyError where DeepSpeed cannot be imported; imports nothing heavy."""
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise MissingDependencyError(
            f"zero={zero_stage} runs on DeepSpeed, which is not installed.",
            advice="Install it (pip install deepspeed) or use zero=none.",
        )


def deepspeed_config(settings: StageSettings, zero: ZeroConfig, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's JSON, every value written out (its "auto" needs a hidden_size that MGM's config has elsewhere)."""
    on_gpu = ranks.device.type == "cuda"
    zero_section: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap_comm and on_gpu,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.reduce_bucket_size,
    }
    if zero.stage == 3:
        zero_section |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size or zero.reduce_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": 1_000_000_000,
        }
    if zero.offload_optimizer is Offload.cpu:
        zero_section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": settings.micro_batch_size * settings.accumulation * ranks.world_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": settings.precision is Precision.bf16, "check_grad_overflow": True},
        "fp16": {"enabled": settings.precision is Precision.fp16, "initial_scale_power": 16},
        "zero_optimization": zero_section,
        # torch's AdamW stays torch's AdamW when its state is offloaded: the alternative compiles for minutes
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def join_deepspeed(ranks: Ranks) -> None:
    """Hands DeepSpeed the process group that :meth:`Ranks.join` made."""
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if ranks.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


class DeepSpeedEngine(Engine):
    """ZeRO-2 or ZeRO-3 around the same module; see :class:`mgm_exp.train.engine.Engine`.

    Args:
        module: Its forward is ``(batch, normalizer) -> loss``.
        trainable: Name -> parameter of all that is trained.
        groups: The optimizer's parameter groups over exactly these.
        settings, zero, ranks: Of the stage, the sharding, this process.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: dict[str, nn.Parameter],
        groups: list[dict[str, Any]],
        settings: StageSettings,
        zero: ZeroConfig,
        ranks: Ranks,
    ) -> None:
        join_deepspeed(ranks)
        import deepspeed

        self.name = "deepspeed"
        self.trainable, self.ranks, self.zero_stage = trainable, ranks, zero.stage
        self.dtype = COMPUTE_DTYPE[settings.precision]
        self.offload = zero.offload_optimizer
        self.version = deepspeed.__version__
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(groups, settings), config=deepspeed_config(settings, zero, ranks)
        )

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def accumulate(self, batch: Batch, normalizer: float, *, last: bool) -> Tensor:
        loss = self.engine(batch, normalizer)
        # DeepSpeed averages gradients over processes, the step's loss is a sum over them
        self.engine.backward(poisoned_if_not_finite(loss) * self.ranks.world_size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; the update itself is in update()
        return loss.detach().float()

    def update(self, lr_factor: float, limits: Limits | None = None, loss: Tensor | None = None) -> Update:
        assert limits is None, "the configuration refuses limits here: DeepSpeed decides before the norm is known"
        set_learning_rates(self.groups, lr_factor)
        scale = float(self.engine.optimizer.loss_scale) if self.dtype is torch.float16 else None
        self.engine.step()
        return Update(bool(self.engine.was_step_applied()), float(self.engine.get_global_grad_norm()), scale)

    def gradient(self, name: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(self.trainable[name])
        if gradient is None or self.dtype is not torch.float16:
            return gradient
        return gradient / float(self.engine.optimizer.loss_scale)

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        for number, (master, state) in enumerate(self.engine.optimizer.optimizer.state.items()):
            yield f"fp32 weights of group {number}", master.detach()
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{key} of group {number}", value

    def snapshot(self) -> Snapshot:
        """Put together from the shards of all processes; on the host of the first one."""
        weights, states = gathered_state(self.engine.optimizer, self.trainable, self.ranks)
        return Snapshot(weights, states, {"loss_scaler": scaler_state(self.engine.optimizer)})

    def restore(self, weights: dict[str, Tensor], states: dict[str, Tensor], extra: dict[str, Any]) -> None:
        scatter_state(self.engine.optimizer, self.trainable, weights, states)
        put_scaler_state(self.engine.optimizer, extra.get("loss_scaler", {}))

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def master(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(self.trainable[name])

    def resident(self, parameter: nn.Parameter) -> Tensor:
        shard = getattr(parameter, "ds_tensor", None)
        return parameter.detach() if shard is None else shard.detach()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "deepspeed": self.version,
            "torch": torch.__version__,
            "world_size": self.ranks.world_size,
            "zero_stage": self.zero_stage,
            "offload_optimizer": self.offload.value,
            "device": str(self.ranks.device.type),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
