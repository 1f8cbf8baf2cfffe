"""Write the demo dataset: images, raw captions, instruction rows, and questions for validation and test.

    from mgm_exp.data.demo import write_demo
    manifest = write_demo(Path("outputs/demo"))

Files (all text is UTF-8):

- `images/<split>_<number>.png`: 128 x 128 RGB
- `captions_raw.jsonl`: Data-Juicer rows of the training images, one terse caption each
- `instruct.json`: LLaVA rows of the training images, rounds of an image in one conversation, `question_types` beside
- `val.json`, `test.json`: TextVQA 0.5.1 annotation files, one question for each image, ten references
- `specs.jsonl`: what each image of each split shows; for measuring captioners, never an input of training
- `demo.json`: the manifest, written last: a folder without it is incomplete
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mgm_exp.data.demo.captions import raw_caption
from mgm_exp.data.demo.questions import questions_of, references
from mgm_exp.data.demo.scenes import GENERATOR_VERSION, SIZE, render_scene, sample_scene, scene_stream
from mgm_exp.errors import UserError
from mgm_exp.store import spawned_pool, usable_cores

DATASET_NAME = "mgm_demo"
SPLITS = ("train", "val", "test")
MAX_ROUNDS = 6
_CHUNK = 50
_FEW = 100  # so many images are drawn sooner than processes start


@dataclass(frozen=True)
class DemoManifest:
    """What was written.

    Args:
        folder: where.
        n_train, n_val, n_test: images of each split (val and test: also questions).
        n_rounds: question-answer rounds in `instruct.json`.
        seed: seed of the set.
        generator_version: bumped whenever equal seeds give other data.
        fingerprint: SHA-256 over rendered pixels and all texts, in order; independent of file compression.
    """

    folder: Path
    n_train: int
    n_val: int
    n_test: int
    n_rounds: int
    seed: int
    generator_version: int
    fingerprint: str


@dataclass(frozen=True)
class _Row:
    """One image's share of the text files, and the digest of its pixels and texts."""

    spec: dict[str, Any]
    caption: dict[str, Any] | None
    conversation: dict[str, Any] | None
    annotation: dict[str, Any] | None
    digest: bytes


def image_name(split: str, index: int) -> str:
    """File name of an image, relative to the dataset folder."""
    return f"images/{split}_{index:05d}.png"


def _conversation(name: str, image: str, rounds: list[Any]) -> dict[str, Any]:
    turns = []
    for number, question in enumerate(rounds):
        prefix = "<image>\n" if number == 0 else ""
        turns.append({"from": "human", "value": prefix + question.question})
        turns.append({"from": "gpt", "value": question.answer})
    types = [q.question_type for q in rounds]
    return {"id": name, "image": image, "conversations": turns, "question_types": types}


def _make_row(folder: str, seed: int, split: str, index: int) -> _Row:
    scene = sample_scene(seed, split, index)
    pixels = render_scene(scene).pixels
    name, image = f"{split}_{index:05d}", image_name(split, index)
    # Level 1: the noise hardly compresses, higher levels only cost time.
    Image.fromarray(pixels).save(os.path.join(folder, image), compress_level=1)
    rng = scene_stream(seed, f"{split}-texts", index)
    spec = {"id": name, "image": image, "split": split, "items": [asdict(item) for item in scene.items]}
    caption = conversation = annotation = None
    if split == "train":
        text = f"<__dj__image>\n{raw_caption(scene, rng)} <|__dj__eoc|>"
        caption = {"id": name, "text": text, "images": [image]}
        rounds = questions_of(scene)
        rng.shuffle(rounds)
        conversation = _conversation(name, image, rounds[:MAX_ROUNDS])
    else:
        question = rng.choice(questions_of(scene))
        annotation = {
            "question_id": SPLITS.index(split) * 1_000_000 + index,
            "question": question.question,
            "question_tokens": question.question.rstrip("?").split(),
            "question_type": question.question_type,
            "image_id": name,
            "image_classes": [item.kind for item in scene.items],
            "image_width": SIZE,
            "image_height": SIZE,
            "answers": references(question, rng),
            "set_name": split,
        }
    texts = json.dumps([spec, caption, conversation, annotation], sort_keys=True)
    digest = hashlib.sha256(pixels.tobytes() + texts.encode()).digest()
    return _Row(spec, caption, conversation, annotation, digest)


def _make_rows(job: tuple[str, int, str, int, int]) -> list[_Row]:
    folder, seed, split, start, stop = job
    return [_make_row(folder, seed, split, index) for index in range(start, stop)]


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write_lines(path: Path, rows: list[Any]) -> None:
    _write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_demo(
    folder: Path,
    *,
    n_train: int = 2000,
    n_val: int = 400,
    n_test: int = 600,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoManifest:
    """Generate the demo dataset into a folder (about 10 s on two cores at the default size).

    Args:
        folder: created if absent; files of an earlier, unfinished call are overwritten.
        n_train, n_val, n_test: images of each split. Image i does not depend on these numbers.
        seed: seed of the set; other seeds give other images and questions of the same kind.
        workers: processes; None: one for each usable core, or this one for a few images. Changes no result.
        progress: called with (images done, images in all) now and then.

    Raises:
        UserError: a count is negative or `workers` is below 1.
    """
    counts = dict(zip(SPLITS, (n_train, n_val, n_test), strict=True))
    for name, count in counts.items():
        if count < 0:
            raise UserError(f"demo data: n_{name}={count} was given; allowed is 0 or more images.")
    total = sum(counts.values())
    workers = (usable_cores() if total > _FEW else 1) if workers is None else workers
    if workers < 1:
        raise UserError(f"demo data: workers={workers} was given; allowed is 1 or more processes, or none given.")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    jobs = [
        (str(folder), seed, split, start, min(start + _CHUNK, counts[split]))
        for split in SPLITS
        for start in range(0, counts[split], _CHUNK)
    ]
    rows: list[_Row] = []

    def collect(chunks: Any) -> None:
        for chunk in chunks:
            rows.extend(chunk)
            if progress is not None:
                progress(len(rows), total)

    if workers == 1 or len(jobs) <= 1:
        collect(map(_make_rows, jobs))
    else:
        pool = spawned_pool(workers)
        try:
            collect(pool.map(_make_rows, jobs))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    conversations = [row.conversation for row in rows if row.conversation is not None]
    _write_lines(folder / "captions_raw.jsonl", [row.caption for row in rows if row.caption is not None])
    _write_text(folder / "instruct.json", json.dumps(conversations, indent=1))
    for split in ("val", "test"):
        data = [r.annotation for r in rows if r.annotation is not None and r.annotation["set_name"] == split]
        header = {"dataset_type": split, "dataset_name": DATASET_NAME, "dataset_version": "0.5.1", "data": data}
        _write_text(folder / f"{split}.json", json.dumps(header, indent=1))
    _write_lines(folder / "specs.jsonl", [row.spec for row in rows])
    manifest = DemoManifest(
        folder=folder,
        n_train=n_train,
        n_val=n_val,
        n_test=n_test,
        n_rounds=sum(len(c["question_types"]) for c in conversations),
        seed=seed,
        generator_version=GENERATOR_VERSION,
        fingerprint=hashlib.sha256(b"".join(row.digest for row in rows)).hexdigest(),
    )
    record = {k: v for k, v in asdict(manifest).items() if k != "folder"}
    _write_text(folder / "demo.json", json.dumps({"dataset_name": DATASET_NAME, **record}, indent=1) + "\n")
    return manifest
