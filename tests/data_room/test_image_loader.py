"""Images decoded ahead, in other processes: the same images and faults in the same order."""

from __future__ import annotations

from pathlib import Path

from mgm_exp.data.image_loader import ImageLoader
from mgm_exp.data.images import ImageFault


def test_the_number_of_processes_changes_nothing(root: Path) -> None:
    (root / "3.png").write_bytes(b"")
    names = [f"{i % 11}.png" for i in range(24)]  # 10.png is missing

    def opened(workers: int) -> list[object]:
        with ImageLoader(root, 50, workers) as loader:
            first, second = loader.begin(names), loader.begin(names[:1])
            found = [*first(), *second(), *loader.begin([])()]
        return [(o.kind, o.detail) if isinstance(o, ImageFault) else (o.size, o.tobytes()) for o in found]

    here = opened(0)
    assert opened(2) == here
    assert len(here) == 25 and here[3][0] == "zero_bytes" and here[10][0] == "missing"  # type: ignore[index]
