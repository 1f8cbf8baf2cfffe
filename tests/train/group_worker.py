"""Not a test: one process of a group that trains several jobs one after the other (start-up is paid once).

Started by torch's elastic launcher with a folder: trains every ``FOLDER/*.job.json`` in the order of their names, with
the product's own loop and engines. Where ``NUMBER.job.json.others`` names a file of rows, the second process reads that
one (its machine sees another file); what becomes of it is written to ``out-of-step-<rank>.txt`` in the job's folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def main(folder: Path) -> None:
    from mgm_exp.config import Device
    from mgm_exp.errors import TrainingFailed
    from mgm_exp.store import die_with_parent
    from mgm_exp.train.job import TrainJob
    from mgm_exp.train.listener import Listener
    from mgm_exp.train.loop import train_stage
    from mgm_exp.train.ranks import Ranks
    from mgm_exp.train.stop import StopRequest
    from tests.train.poison import loud, poison_pixels

    die_with_parent()
    ranks = Ranks.join(Device.cpu)
    for path in sorted(folder.glob("*.job.json")):
        job = TrainJob.from_json(path.read_text())
        others = folder / f"{path.name}.others"
        if others.exists():
            if ranks.rank == 1:
                job = replace(job, records=Path(others.read_text()))
            try:
                train_stage(job, ranks, Listener(), StopRequest())
            except TrainingFailed as error:
                (job.work / f"out-of-step-{ranks.rank}.txt").write_text(str(error))
            continue
        noisy = loud((folder / f"{path.name}.loud").read_text().split())
        with noisy, poison_pixels((folder / f"{path.name}.poison").read_text().split()):
            train_stage(job, ranks, Listener(), StopRequest())
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
