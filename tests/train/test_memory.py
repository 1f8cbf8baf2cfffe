"""Peak memory belongs to the stage, not to what the process did before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mgm_exp.train import memory
from mgm_exp.train.memory import PeakMemory


def test_an_earlier_peak_does_not_count_and_a_later_one_does() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the kernel does not let this process reset its peak: {error}")
    early = torch.ones(100_000_000)  # 0.37 GiB
    before = PeakMemory(torch.device("cpu")).gib()
    del early
    peak = PeakMemory(torch.device("cpu"))
    at_start = peak.gib()
    assert at_start < before - 0.3
    late = torch.ones(50_000_000)
    del late
    assert peak.gib() == pytest.approx(at_start + 0.186, abs=0.03)


def test_without_the_reset_the_largest_sample_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([3.0, 5.0, 4.0])
    monkeypatch.setattr(memory, "_status_kib", lambda key: int(next(samples) * 1024 * 1024))
    peak = PeakMemory(torch.device("cpu"))
    peak._is_reset = False
    assert [peak.gib() for _ in range(3)] == [3.0, 5.0, 5.0]
