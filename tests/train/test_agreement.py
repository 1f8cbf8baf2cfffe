"""Processes at different steps, or with different samples, are named."""

from __future__ import annotations

import pytest

from mgm_exp.errors import TrainingFailed
from mgm_exp.train.agreement import batch_fingerprint, check_agreement


def test_agreement_passes() -> None:
    check_agreement([4.0] * 4, [7.0] * 4)


def test_the_minority_is_named() -> None:
    with pytest.raises(TrainingFailed, match=r"process 2 is at step 6 .*; 3 other\(s\) are at step 5"):
        check_agreement([4.0, 4.0, 5.0, 4.0], [7.0] * 4)
    with pytest.raises(TrainingFailed, match=r"process 1 is at step 5 with batch 0000000000008"):
        check_agreement([4.0, 4.0], [7.0, 8.0])


def test_the_fingerprint_is_of_samples_and_rows_and_survives_float64() -> None:
    found = {batch_fingerprint(samples, data) for samples in ([1, 2], [2, 1], [12]) for data in ("a", "b")}
    assert len(found) == 6
    assert all(int(float(value)) == value < 2**52 for value in found)
