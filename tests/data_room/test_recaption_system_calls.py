"""Recaptioning is killed at each system call by which it changes the disk: the next attempt ends as an undisturbed one
(needs strace)."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.fault_table import met
from tests.system_calls import CHANGES, Traced, strace_or_skip

from .captioning_shards import pictures, results

SCENARIO = "tests.data_room.captioning_shards:caption"
NTH = 200


def test_killed_at_each_system_call_the_captions_are_the_same(tmp_path: Path) -> None:
    strace_or_skip()
    fresh, folder, points = tmp_path / "fresh", tmp_path / "set", []
    pictures(fresh)

    def prepare() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)
        return folder

    with Traced(SCENARIO) as clean, Traced(SCENARIO, CHANGES, nth=NTH) as traced:
        assert clean.run(prepare())[0] == 0
        undisturbed = results(folder)
        for point, _ in traced.each_call(prepare, CHANGES, nth=NTH):
            code, said = clean.run(folder)
            assert code == 0, (point, said)
            assert results(folder) == undisturbed, point
            points.append(point)
    assert len(points) >= 25, points
    met("kill: recaption", len(points))
