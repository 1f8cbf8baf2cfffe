"""What is done about trouble: the batch is named, and the stage goes back to where all was well, or ends.

Everything here happens on every process at the same step, because all of them decide by the same numbers. It can be
killed at any point: the newer checkpoints go first, the one that is gone back to is saved again last, and until it is,
the same steps are computed again and lead to the same decision.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.config import GuardAction
from mgm_exp.errors import LossNotFinite, TrainingFailed
from mgm_exp.store import remove_folder
from mgm_exp.train.checkpoint import Progress, load_newest
from mgm_exp.train.guards import Guards, Trouble
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.train.assemble import Stage
    from mgm_exp.train.job import TrainJob

ROLLBACK = "rollback"


def roll_back(root: Path, stage: Stage, guards: Guards, progress: Progress, trouble: Trouble, ranks: Ranks) -> Progress:
    """Loads the newest whole checkpoint from before the trouble; the batches since then are left out from now on.

    Args:
        root: The stage's checkpoints; those that are newer are deleted.
        progress: Where the stage is.

    Returns:
        Where it is now; the caller saves it.

    Raises:
        TrainingFailed: There is none that old.
    """
    if ranks.is_first:
        for folder in sorted(root.glob("step-*"), reverse=True):
            if (found := re.fullmatch(r"step-(\d+)(\.old)?", folder.name)) and int(found[1]) > trouble.onset:
                remove_folder(folder)
    ranks.barrier()
    restored, _ = load_newest(root, stage.engine, stage.belongs_to, ranks)
    if restored is None:
        raise TrainingFailed(
            f"{in_words(trouble, progress)}; a roll-back is asked for, and there is no checkpoint from step "
            f"{trouble.onset} or before.",
            advice="Save more often (train.checkpoint.every_steps), keep more of them (train.checkpoint.keep), or take "
            "lower_lr in place of rollback.",
        )
    now = restored.guards
    for key in ("lr_factor", "actions", "counts"):
        now[key] = guards.state[key]
    now["rollbacks"] = guards.state["rollbacks"] + 1
    now["batches_skipped"] = guards.batches_skipped + progress.step - restored.step
    restored.seconds, restored.peak_memory_gib = progress.seconds, progress.peak_memory_gib
    restored.resumed_from = progress.resumed_from
    return restored


def failure_of(
    trouble: Trouble, progress: Progress, samples: list[str], guards: Guards, job: TrainJob
) -> LossNotFinite:
    """The error that ends a stage whose policy is to stop, or whose actions are used up."""
    shown = ", ".join(samples[:8]) + (", ..." if len(samples) > 8 else "")
    why = ""
    if trouble.is_exhausted and guards.state["actions"] > guards.config.max_actions:
        why = f" {trouble.action.value} was done {guards.config.max_actions} times already (train.guards.max_actions);"
    return LossNotFinite(
        f"{in_words(trouble, progress)} (samples {shown});{why} the {job.stage} stage ends, and its last good "
        "checkpoint is kept.",
        advice="Lower the learning rate, lengthen the warm-up, use bf16 or fp32 in place of fp16, or remove the "
        f"samples that quarantine.jsonl names; the last good checkpoint is in {job.checkpoints}.",
    )


def in_words(trouble: Trouble, progress: Progress) -> str:
    """One sentence without its end."""
    if trouble.reason == "not_finite":
        return f"Loss or gradient was {trouble.detail} at step {progress.step}"
    return f"A {trouble.reason} at step {progress.step}: {trouble.detail}"


def ends(trouble: Trouble) -> bool:
    """Whether the stage ends with it."""
    return trouble.is_exhausted or trouble.action is GuardAction.stop
