from __future__ import annotations

from pathlib import Path

import pytest

from mgm_exp.data.captioner import captioner_accuracy
from mgm_exp.data.demo import write_demo
from mgm_exp.data.demo.true_captions import write_true_captions
from mgm_exp.data.formats import Row, read_rows
from mgm_exp.errors import DataError


def test_true_captions_are_right_in_everything(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", n_train=30, n_val=2, n_test=2, seed=3, workers=1)
    assert write_true_captions(tmp_path / "demo", tmp_path / "true.jsonl") == 30
    rows = [row for row in read_rows(tmp_path / "true.jsonl") if isinstance(row, Row)]
    accuracy = captioner_accuracy({row.id: row.caption or "" for row in rows}, tmp_path / "demo" / "specs.jsonl")
    assert accuracy == {"n": 30, "type": 1, "colour": 1, "shape": 1, "text": 1, "order": 1, "whole": 1}


def test_a_folder_without_demo_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no generated demo data"):
        write_true_captions(tmp_path, tmp_path / "true.jsonl")
