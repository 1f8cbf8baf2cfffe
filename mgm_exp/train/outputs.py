"""What a trained stage leaves to the ones after it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from mgm_exp.config import AdapterKind
from mgm_exp.store import write_json_atomic
from mgm_exp.train.checkpoint import Progress
from mgm_exp.train.guards import Guards
from mgm_exp.train.job import StageSummary, TrainJob
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.train.assemble import Stage


def write_outputs(job: TrainJob, stage: Stage, progress: Progress, guards: Guards, ranks: Ranks) -> StageSummary:
    """Writes the connector, the adapter or the model, the rows and the summary; called by all processes."""
    from mgm_exp.model import family_of

    family = family_of(stage.config.model)
    summary = StageSummary(
        stage=job.stage,
        steps=progress.step,
        skipped_steps=progress.step - progress.updates,
        tokens=progress.tokens,
        seconds=round(progress.seconds, 4),
        train_tokens_per_s=round(progress.tokens / progress.seconds, 3) if progress.seconds else 0.0,
        samples_per_s=round(progress.samples / progress.seconds, 3) if progress.seconds else 0.0,
        peak_memory_gib=round(progress.peak_memory_gib, 4),
        data_wait_share=round(progress.data_wait_share(is_hidden=stage.engine.reads_late), 4),
        final_loss=progress.last_loss,
        trainable={**stage.trainable.record(), "verified": progress.verified},
        engine=stage.engine.describe(),
        n_parameters=stage.n_parameters,
        n_train=stage.n_train,
        resumed_from=progress.resumed_from,
        load_report=stage.load_report,
        ended_early=progress.step < stage.n_steps,
        guards=guards.record(),
    )
    is_full = job.stage == "instruct" and stage.config.adapter.kind is AdapterKind.full
    with stage.engine.gathered(family.to_be_written(stage.model, is_full)):
        if ranks.is_first:
            job.out.mkdir(parents=True, exist_ok=True)
            family.save(stage.model, job.stage, is_full, job.out)
            shutil.copyfile(job.metrics, job.out / "metrics.jsonl")
            write_json_atomic(job.out / "summary.json", summary.to_dict())
    ranks.barrier()
    return summary
