"""What a micro-batch holds is counted before the forward pass, exactly as the model merges and cuts it."""

from __future__ import annotations

from pathlib import Path

import torch

from mgm_exp.data import collate, read_records
from mgm_exp.model import load_model, load_processor
from mgm_exp.train.assemble import count, open_dataset
from mgm_exp.train.job import derived_seed, stage_settings
from mgm_exp.train.step import seed_generators

from .conftest import MGM, job_in


def test_counts_are_those_of_the_merged_batch(tmp_path: Path) -> None:
    model = load_model(MGM / "model")
    seen = set()
    for max_length in (128, 32, 30, 28, 26, 24, 20):
        job = job_in(tmp_path, n_records=8, max_length=max_length)
        config = job.experiment()
        processor = load_processor(MGM / "model", max_length)
        dataset = open_dataset(job, config, stage_settings(config, "instruct"), processor)
        batch = collate([dataset[i] for i in range(8)], processor.pad_token_id)
        model.config.tokenizer_model_max_length = max_length
        with torch.no_grad():
            _, mask, labels = model.merge(
                batch["input_ids"],
                batch["attention_mask"],
                batch["labels"],
                images=batch["images"],
                images_aux=batch["images_aux"],
            )
        counted = count(batch, processor.n_visual_tokens, max_length)
        assert counted.tokens == int(mask.sum())
        assert counted.supervised == int((labels[:, 1:] != -100).sum())
        assert (counted.samples, counted.images) == (8, 7)
        assert counted.ids == [record.id for record in read_records(job.records)]
        seen.add(counted.supervised)
    assert len(seen) >= 3, "the lengths must cut some labels away"


def test_dropout_depends_on_the_place_in_the_global_batch_alone() -> None:
    drawn = {}
    for step in range(2):
        for micro_batch in range(3):
            seed_generators(7, step, micro_batch)
            drawn[step, micro_batch] = torch.rand(4).tolist()
    assert len({tuple(values) for values in drawn.values()}) == 6
    torch.rand(100)
    seed_generators(7, 1, 2)
    assert torch.rand(4).tolist() == drawn[1, 2]
    assert derived_seed(7, "dropout", 1, 2) != derived_seed(7, "dropout", 12)
    torch.manual_seed(derived_seed(7, "dropout", 1, 2))
    assert torch.rand(4).tolist() == drawn[1, 2], "the generator that torch's own function seeds"
