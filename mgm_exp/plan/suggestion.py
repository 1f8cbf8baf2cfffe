"""Settings to begin with for a model, a memory and a number of rows: each with its reason, none without arithmetic.

What is a rule of thumb says so. Memory is that of :mod:`mgm_exp.plan.cell`; what must be tried out (the learning rate,
the rank) is given as a beginning and as a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mgm_exp.config import ExperimentConfig, Offload, validate
from mgm_exp.errors import ConfigError, UserError
from mgm_exp.plan.architecture import architecture_of, parameters_of
from mgm_exp.plan.cards import Device, verdict
from mgm_exp.plan.cell import predicted_memory_gib
from mgm_exp.plan.memory import GIB
from mgm_exp.plan.stage_plan import plan_stage, stages_of

ConfigOf = Callable[[Sequence[str]], ExperimentConfig]

# What a weight can hold of facts: about two bits (Allen-Zhu & Li, arXiv 2404.05405).
BITS_A_PARAMETER = 2.0
# What a learnt token tells, roughly: a loss of 0.7 nats is a bit.
BITS_A_TOKEN = 1.0
RANKS = (8, 16, 32, 64, 128)
_USUAL_RANK = 16
_MICRO = (32, 16, 8, 4, 2, 1)
_LEAST_STEPS = 200
_WARM_UP_STEPS = 10
_OFFICIAL_WARM_UP = 0.03
# Ways to share out training state, the quickest first.
WAYS = {
    "none": (0, Offload.none),
    "ZeRO-2": (2, Offload.none),
    "ZeRO-3": (3, Offload.none),
    "ZeRO-3, offload": (3, Offload.cpu),
}
Found = TypeVar("Found")
# What is suggested, and cannot be fixed before.
_CHOSEN = (
    "adapter", "adapter.rank", "adapter.alpha", "adapter.target_modules", "train.epochs", "train.global_batch_size",
    "train.warmup_ratio", "train.lr", "train.micro_batch_size", "train.align.micro_batch_size",
    "model.gradient_checkpointing", "zero", "zero.stage", "zero.offload_optimizer", "devices",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One setting.

    Args:
        override: As it is given to a run.
        reason: Why, with the numbers it follows from.
    """

    override: str
    reason: str


@dataclass(frozen=True)
class Least:
    """What a way to train needs at least, in GiB: one sample in a pass, every block computed again.

    Args:
        peak: Of a process.
        state: Weights, gradients and optimizer at the peak, before activations.
        verdict: ``fits``, ``tight`` or ``does not fit``.
    """

    peak: float
    state: float
    verdict: str


@dataclass(frozen=True)
class Suggestion:
    """What to begin with.

    Args:
        choices: Every setting with its reason.
        peak_gib: Predicted peak memory of one process with them.
        verdict: ``fits`` or ``tight``.
        table: Adapter -> way of sharding -> peak in GiB, or why it cannot be; with the batch and the checkpointing of
            the suggestion.
        least: The same with one sample in a pass and gradient checkpointing: the peak, what weights, gradients and
            optimizer take of it, and the verdict.
    """

    choices: list[Choice]
    peak_gib: float
    verdict: str
    table: dict[str, dict[str, float | str]]
    least: dict[str, dict[str, Least | str]]

    @property
    def overrides(self) -> list[str]:
        return [part for choice in self.choices for part in choice.override.split()]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "overrides": self.overrides,
            "choices": [vars(choice) for choice in self.choices],
            "peak_gib": round(self.peak_gib, 4),
            "verdict": self.verdict,
            "table": self.table,
            "least": {
                name: {way: one if isinstance(one, str) else vars(one) for way, one in row.items()}
                for name, row in self.least.items()
            },
        }


def suggest(
    config_of: ConfigOf, fixed: Sequence[str], *, devices: int, rows: int, text_tokens: int, device: Device
) -> Suggestion:
    """Adapter, rank, targets, batch, learning rate, warm-up, epochs and sharding to begin with.

    Args:
        config_of: The checked configuration that some overrides compose to.
        fixed: Overrides that it is to go with, such as the model.
        devices: Cards.
        rows: Conversations to learn from.
        text_tokens: Mean tokens of one beside its image's; half of them are learnt.
        device: Whose memory is to be enough.

    Raises:
        UserError: nothing fits in that memory, or something is fixed that is to be suggested.
    """
    own = [item for item in fixed if item.partition("=")[0].lstrip("+") in _CHOSEN]
    if own:
        raise UserError(
            f"{' '.join(own)}: a suggestion has one of its own.",
            advice="Leave it out here (cards are --devices) and change it in the command that is printed; "
            "`mgm-exp plan` shows what that needs.",
        )
    given = [f"devices={devices}", *fixed]
    base = config_of([*fixed, "devices=1", "adapter=lora_r8", *_micro(1)])
    choices = [_rank(base, rows, text_tokens)]
    choices.append(
        Choice(
            "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
            "all linear layers of the LLM: attention alone lags behind full fine-tuning at any rank "
            "(arXiv 2305.14314, figure 2)",
        )
    )
    epochs = 3 if rows < 5_000 else 2 if rows < 50_000 else 1
    choices.append(
        Choice(
            f"train.epochs={epochs}",
            "the official recipe sees a large mixture once; few rows are seen two or three times before a model learns "
            "them by heart (rule of thumb: watch train.validation)",
        )
    )
    batch = _global_batch(rows * epochs, devices)
    steps = max(1, math.ceil(rows * epochs / batch))
    choices.append(
        Choice(
            f"train.global_batch_size={batch}",
            f"{steps:,} steps; 128 is official, and less where that would leave fewer than {_LEAST_STEPS} steps",
        )
    )
    align_batch = base.train.align.global_batch_size
    if align_batch % devices:
        official, align_batch = align_batch, max(1, align_batch // devices) * devices
        choices.append(
            Choice(
                f"train.align.global_batch_size={align_batch}",
                f"{official} cannot be shared out to {devices} cards",
            )
        )
    batches = [choice.override for choice in choices if "global_batch_size" in choice.override]
    warm_up = min(0.1, max(_OFFICIAL_WARM_UP, round(_WARM_UP_STEPS / steps, 3)))
    choices.append(
        Choice(
            f"train.warmup_ratio={warm_up:g}",
            f"{max(1, round(warm_up * steps))} steps: {_OFFICIAL_WARM_UP:g} is official, and AdamW's second moments "
            f"want about {_WARM_UP_STEPS}",
        )
    )
    lr, lr_of_full = base.train.default_lr.lora, base.train.default_lr.full
    choices.append(
        Choice(
            f"train.lr={lr:g}",
            f"{lr / lr_of_full:.2g} times that of full fine-tuning ({lr_of_full:g}), whatever the rank, as "
            f"alpha / rank stays 2; to be searched from {lr / 4:g} to {5 * lr:g} (python -m mgm_exp -m "
            "+sweeps=lora_search)",
        )
    )
    so_far = [*given, *(part for choice in choices for part in choice.override.split())]
    memory, gib = _memory(config_of, so_far, math.gcd(batch, align_batch) // devices, device)
    choices += memory
    chosen = [*so_far, *(part for choice in memory for part in choice.override.split())]
    return Suggestion(
        choices,
        gib,
        verdict(gib, device),
        _table(config_of, chosen, choices[0].override),
        _least(config_of, [*given, *batches], choices[0].override, device),
    )


def _rank(config: ExperimentConfig, rows: int, text_tokens: int) -> Choice:
    """The least rank whose weights can hold what the learnt tokens say."""
    sizes = architecture_of(config.model)
    frozen = parameters_of(sizes, "instruct", config.adapter, is_connector_frozen=True)
    a_rank = frozen.lora / config.adapter.rank
    bits = rows * text_tokens / 2 * BITS_A_TOKEN
    needed = bits / (BITS_A_PARAMETER * a_rank)
    rank = next((rank for rank in RANKS if rank >= needed), RANKS[-1])
    more = "" if needed <= RANKS[-1] else ", less than the data asks for: compare adapter=full where it fits"
    return Choice(
        f"adapter=lora_r{rank}" if rank < RANKS[-1] else f"adapter=lora_r64 adapter.rank={rank}",
        f"{rows:,} rows with {text_tokens / 2:.0f} learnt tokens are about {bits / 1e6:.1f} million bits; a rank has "
        f"{a_rank / 1e6:.2f} million weights of about two bits (arXiv 2404.05405), so {needed:.1f} would hold them; "
        f"the next of {', '.join(map(str, RANKS))}{more}. alpha = 2 x rank, as the official script has it",
    )


def _global_batch(samples: int, devices: int) -> int:
    """A power of two times the devices, from 16 to 128, that leaves enough steps."""
    sizes = [size * devices // math.gcd(size, devices) for size in (128, 64, 32, 16)]
    return next((size for size in sizes if samples / size >= _LEAST_STEPS), sizes[-1])


def _memory(config_of: ConfigOf, so_far: Sequence[str], samples: int, device: Device) -> tuple[list[Choice], float]:
    """The micro-batch, and how much is computed again or sharded, so that it fits with a tenth to spare.

    ``samples`` of one card in a step are a multiple of the micro-batch, in both stages. Without checkpointing a step
    does less, so it is preferred from two samples on; the result is the same.
    """
    tried = []
    for stage, offload in WAYS.values():
        zero = [f"zero={stage or 'none'}", *(["zero.offload_optimizer=cpu"] if offload is Offload.cpu else [])]
        for checkpointing, least in ((False, 2), (True, 1)):
            sizes = [size for size in _MICRO if size >= least and samples % size == 0]
            if not sizes:
                continue
            again = f"model.gradient_checkpointing={str(checkpointing).lower()}"
            try:
                config = config_of([*so_far, *zero, again, *_micro(sizes[-1])])
            except ConfigError:
                continue
            for size in sizes:
                config.train.micro_batch_size = config.train.align.micro_batch_size = size
                gib = predicted_memory_gib(config)
                if verdict(gib, device) == "fits":
                    return _memory_choices(zero, size, checkpointing, _done_again(config), gib, device), gib
                tried.append(gib)
    least_of_all = f"; the least that was found is {min(tried):.1f} GiB" if tried else ""
    raise UserError(
        f"No way to train this model with LoRA fits in {device.memory_gib:.1f} GiB{least_of_all}.",
        advice="Take adapter=qlora, more devices with zero=3, a smaller train.max_length or a smaller model; "
        "`mgm-exp plan` shows what each needs.",
    )


def _micro(size: int) -> list[str]:
    return [f"train.micro_batch_size={size}", f"train.align.micro_batch_size={size}"]


def _done_again(config: ExperimentConfig) -> float:
    """What checkpointing adds to the operations of the instruct stage, as a share."""
    sizes = architecture_of(config.model)
    more, less = (
        plan_stage(replace(config, model=replace(config.model, gradient_checkpointing=again)), sizes, "instruct").flops
        for again in (True, False)
    )
    assert more is not None and less is not None, "plan.rows is given"
    return more / less - 1


def _memory_choices(
    zero: Sequence[str], size: int, checkpointing: bool, again_share: float, gib: float, device: Device
) -> list[Choice]:
    largest = f"{gib:.1f} GiB at the peak, of {device.room_gib:.1f}: the largest that fits with a tenth to spare"
    again = (
        f"without it fewer than two samples would fit; a step has {again_share:.0%} more operations"
        if checkpointing
        else f"it fits without computing anything twice, which would be {again_share:.0%} more operations"
    )
    sharding = "all of it fits on one card" if zero == ["zero=none"] else "a process of its own size would not fit"
    return [
        Choice(" ".join(_micro(size)), largest),
        Choice(f"model.gradient_checkpointing={str(checkpointing).lower()}", again),
        Choice(" ".join(zero), sharding),
    ]


def _table(config_of: ConfigOf, chosen: Sequence[str], lora: str) -> dict[str, dict[str, float | str]]:
    """Peak of every adapter with every way of sharding."""
    rank = config_of(chosen).adapter.rank
    own = [item for item in chosen if not item.startswith(("adapter", "zero", "train.lr="))]
    bases = {
        "full": config_of([*own, "adapter=full"]),
        f"LoRA r={rank}": config_of([*own, *lora.split()]),
        f"QLoRA r={rank}": config_of([*own, "adapter=qlora", f"adapter.rank={rank}"]),
    }
    return {
        name: {way: _of_way(base, way, lambda config: round(predicted_memory_gib(config), 2)) for way in WAYS}
        for name, base in bases.items()
    }


def _least(config_of: ConfigOf, given: Sequence[str], lora: str, device: Device) -> dict[str, dict[str, Least | str]]:
    """What every adapter needs at least, with every way of sharding; LoRA r=16 beside the rank that is suggested."""
    own = [item for item in given if not item.startswith("adapter")]
    again = [*own, "model.gradient_checkpointing=true", *_micro(1)]
    suggested = config_of([*again, *lora.split()])
    bases = {"full": config_of([*again, "adapter=full"])}
    for name, base in (("LoRA", suggested), ("QLoRA", config_of([*again, "adapter=qlora"]))):
        for rank in sorted({suggested.adapter.rank, _USUAL_RANK}):
            bases[f"{name} r={rank}"] = _with_rank(base, rank)

    def least(config: ExperimentConfig) -> Least:
        sizes = architecture_of(config.model)
        peak = max((plan_stage(config, sizes, name).peak for name in stages_of(config)), key=lambda peak: peak.total)
        gib, state = peak.total / GIB, (peak.weights + peak.gradients + peak.optimizer) / GIB
        return Least(round(gib, 2), round(state, 2), verdict(gib, device))

    return {name: {way: _of_way(base, way, least) for way in WAYS} for name, base in bases.items()}


def _of_way(config: ExperimentConfig, way: str, found: Callable[[ExperimentConfig], Found]) -> Found | str:
    """What is found of a configuration under a way of sharding, or why the two do not go together."""
    stage, offload = WAYS[way]
    config = replace(config, zero=replace(config.zero, stage=stage, offload_optimizer=offload))
    try:
        validate(config)
    except ConfigError as error:
        return error.message
    return found(config)


def _with_rank(config: ExperimentConfig, rank: int) -> ExperimentConfig:
    return replace(config, adapter=replace(config.adapter, rank=rank, alpha=2 * rank))
