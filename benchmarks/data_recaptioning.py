"""Recaptioning: our loop, and Data-Juicer's ``image_captioning_mapper``, with one BLIP-2 on the same pictures.

The model is demo-blip2 (1.4 million parameters), so that what is measured is the loop around a model: reading,
decoding, preparing and writing, not a large model's arithmetic. The mapper always samples, up to 128 tokens; ours
writes greedily. Both have written a few captions before the clock starts, and what a call with four pictures takes is
taken off, because the mapper loads its model anew in each call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measurement import Row, timed

N, N_QUICK = 256, 24
BATCHES = (1, 16)
WARM_UP = 4


def run(work: Path, quick: bool) -> list[Row]:
    """Measures both loops at each batch size."""
    from mgm_exp.data import Row as DataRow
    from mgm_exp.data import read_rows
    from mgm_exp.data.captioner.accuracy import captioner_accuracy
    from mgm_exp.data.captioner.demo_blip2 import demo_folder
    from mgm_exp.data.demo import write_demo

    n = N_QUICK if quick else N
    root = work / "demo"
    write_demo(root, n_train=n, n_val=0, n_test=0)
    rows = [row for row in read_rows(root / "captions_raw.jsonl") if isinstance(row, DataRow)][:n]
    model = demo_folder(work / "models")
    ours = {batch: _ours(rows, model, root, work / f"ours-{batch}", batch) for batch in BATCHES}
    theirs = {batch: _mapper(rows, model, root, work / f"mapper-{batch}", batch) for batch in BATCHES}
    same = ours[BATCHES[0]][1] == ours[BATCHES[1]][1]
    found = []
    for batch in BATCHES:
        (ours_s, captions), (peer_s, sampled) = ours[batch], theirs[batch]
        right, peer_right = (captioner_accuracy(said, root / "specs.jsonl")["text"] for said in (captions, sampled))
        found.append(
            Row(
                f"recaptioning at batch {batch}",
                "s",
                ours_s,
                peer_s,
                1.0,
                f"captions at batch 1 and 16 {'are equal' if same else 'DIFFER'}; texts read right: ours {right:.1%}, "
                f"the mapper's {peer_right:.1%} (it samples)",
                f"{n - WARM_UP} pictures, demo-blip2 on the CPU, one thread; recaption() with its files fsynced after "
                f"every batch ({(n - WARM_UP) / ours_s:.1f}/s), Data-Juicer's mapper ({(n - WARM_UP) / peer_s:.1f}/s)",
            )
        )
    return found


def _ours(rows: list[Any], model: Path, root: Path, work: Path, batch: int) -> tuple[float, dict[str, str]]:
    from mgm_exp.data import Row as DataRow
    from mgm_exp.data import read_rows, recaption
    from mgm_exp.data.captioner.blip2 import Blip2Captioner
    from mgm_exp.data.captioner.model_captioner import CaptionSettings

    captioner = Blip2Captioner(model, "cpu", CaptionSettings(batch_size=batch))

    def loop(given: list[Any], name: str) -> Path:
        for part in ("work", "out"):
            (work / name / part).mkdir(parents=True)
        folder = work / name
        recaption(given, captioner, image_root=root, work=folder / "work", out=folder / "out", batch_size=batch)
        return folder / "out" / "captions.jsonl"

    loop(rows[:WARM_UP], "warm")
    fixed_s, _ = timed(lambda: loop(rows[:WARM_UP], "few"))
    seconds, captions = timed(lambda: loop(rows, "all"))
    seconds -= fixed_s
    written = (row for row in read_rows(captions) if isinstance(row, DataRow))
    return seconds, {row.id: row.caption or "" for row in written}


def _mapper(rows: list[Any], model: Path, root: Path, work: Path, batch: int) -> tuple[float, dict[str, str]]:
    from mgm_exp.data.data_juicer import guards

    guards.apply()
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor
    from data_juicer.core.data import NestedDataset
    from datasets import Dataset
    from transformers import set_seed

    from mgm_exp.data.data_juicer.captioning import mapper_yaml
    from mgm_exp.data.formats import DJ_END, DJ_IMAGE

    work.mkdir()
    config = work / "caption.yaml"
    config.write_text(mapper_yaml(model, batch_size=batch, prompt=None), encoding="utf-8")

    def loop(given: list[Any]) -> list[dict[str, Any]]:
        table = {
            "id": [row.id for row in given],
            "text": [f"{DJ_IMAGE}\n{row.caption} {DJ_END}" for row in given],
            "images": [[str(root / row.image)] for row in given],
        }
        settings = init_configs(["--config", str(config), "--export_path", str(work / "out.jsonl")])
        executor = DefaultExecutor(settings)
        set_seed(0)
        done = executor.run(dataset=NestedDataset(Dataset.from_dict(table)), skip_export=True)
        return list(done.select_columns(["id", "text"]).to_list())

    loop(rows[:WARM_UP])
    fixed_s, _ = timed(lambda: loop(rows[:WARM_UP]))
    seconds, found = timed(lambda: loop(rows))
    return seconds - fixed_s, {
        row["id"]: row["text"].removeprefix(DJ_IMAGE).removesuffix(DJ_END).strip() for row in found
    }
