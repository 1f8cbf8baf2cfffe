"""Lengths of the data at hand: as curated before, as the demo has them, or as assumed; and which of them is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mgm_exp import stages
from mgm_exp.config import ExperimentConfig
from mgm_exp.curated import curated_rows
from mgm_exp.plan import plan_cell
from mgm_exp.preflight import model_fingerprint, model_folder
from tests.plan.settings import config_of

REPORT = {
    "file": "captions_raw.jsonl", "image_root": "", "kept": 500, "tokens": 50_000, "supervised_tokens": 4_000,
    "lengths": {"max": 120.0},
}  # fmt: skip


def entry(config: ExperimentConfig, name: str = "entry", **changed: Any) -> Path:
    """A curated entry of this configuration in its store, as the curate stage leaves it."""
    demo = stages.key_of("demo", stages.demo_payload(config))
    folder = Path(config.paths.store) / "curate" / name
    folder.mkdir(parents=True)
    inputs = {
        "align": demo, "align_images": demo, "instruct": demo, "limits": {},
        "augment": {"duplicate": 1, "paraphrase": 0.0}, "bad_rows": config.data.bad_rows.value,
        "max_megapixels": 50.0, "max_samples": None,
        "max_length": [config.train.align.max_length, config.train.max_length],
        "model": model_fingerprint(config, model_folder(config)), **changed.pop("inputs", {}),
    }  # fmt: skip
    meta = {"align": {**REPORT, **changed}, "instruct": {**REPORT, "tokens": 80_000, **changed}}
    (folder / "stage.json").write_text(json.dumps({"inputs": inputs, "meta": meta}), encoding="utf-8")
    (folder / "instruct.jsonl").write_bytes(b"x" * 4096)
    return folder


def of_demo(root: Path, *overrides: str) -> ExperimentConfig:
    return config_of(f"paths.root={root}", f"paths.store={root}/store", *overrides)


def test_curated_rows_give_lengths_and_steps(tmp_path: Path) -> None:
    config = of_demo(tmp_path)
    assert curated_rows(config) == {}
    before = plan_cell(config)
    assert any("84 tokens a sample, as the demo has them" in note for note in before.notes)
    entry(config)
    rows = curated_rows(config)
    assert (rows["align"].rows, rows["align"].length, rows["align"].learnt, rows["align"].longest) == (500, 100, 8, 120)
    plan = plan_cell(config, curated=rows)
    instruct = plan.stages[-1]
    assert instruct.lengths.mean == 160 and instruct.work.length == 120
    assert plan.stages[0].steps is not None and before.stages[0].steps is not None
    assert plan.disk["curated"] == pytest.approx(rows["align"].size / 1024**3, abs=1e-4)
    assert any("as curated" in note for note in plan.notes) and any("longest that was curated" in n for n in plan.notes)
    given = plan_cell(of_demo(tmp_path, "plan.text_tokens=30", "plan.longest_text=40"), curated=rows)
    assert (given.stages[-1].lengths.mean, given.stages[-1].work.length) == (94, 104)


def test_a_newer_entry_that_is_damaged_does_not_hide_one_that_fits(tmp_path: Path) -> None:
    config = of_demo(tmp_path)
    entry(config, "fits")
    for number, damaged in enumerate(({"kept": 0}, {"lengths": None})):
        later = entry(config, f"later {number}", **damaged) / "stage.json"
        os.utime(later, (2e9, 2e9))
    assert curated_rows(config)["align"].rows == 500


@pytest.mark.parametrize(
    "other",
    [
        {"inputs": {"max_length": [1, 1]}},
        {"inputs": {"model": "another"}},
        {"inputs": {"instruct": "another"}},
        {"inputs": {"limits": {"words_num.min": 4}}},
        {"inputs": {"align": "captions of a captioner"}},
        {"kept": 0},
        {"lengths": None},
    ],
    ids=lambda other: str(next(iter(other.get("inputs", other)))),
)
def test_another_entry_says_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    config = of_demo(tmp_path)
    entry(config, **other)
    assert curated_rows(config) == {}


def test_rows_of_ones_own_are_known_by_their_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[]", encoding="utf-8")
    config = of_demo(tmp_path, f"data.path={file}", f"data.image_root={tmp_path}")
    own = {"align": "a", "align_images": "a", "instruct": "a"}
    entry(config, "one", file="rows.json", image_root=str(tmp_path.resolve()), inputs=own)
    assert curated_rows(config)["instruct"].rows == 500
    assert plan_cell(config, curated=curated_rows(config)).stages[-1].steps is not None
    later = file.stat().st_mtime + 10_000
    os.utime(file, (later, later))
    assert curated_rows(config) == {}, "the file has changed since"
    (Path(config.paths.store) / "curate" / "one" / "stage.json").write_text("{", encoding="utf-8")
    assert curated_rows(config) == {}


def test_without_curated_rows_the_assumption_is_said() -> None:
    notes = plan_cell(config_of("model=mgm_2b", "plan.device=a10")).notes
    assert any("124 tokens of text a sample (an assumption" in note for note in notes)
