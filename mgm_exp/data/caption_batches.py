"""What captioner and scorer say of rows, batch by batch; each batch is one file, written whole or not at all.

A batch whose file an interrupted attempt left is not asked again. Images are decoded ahead of the captioner.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mgm_exp.data.caption_choice import CaptionChoice, Said, can_be_recaptioned, caption_of, fault_of, one_line
from mgm_exp.data.formats import Row
from mgm_exp.data.image_loader import ImageLoader, Opened
from mgm_exp.data.images import ImageFault
from mgm_exp.data.records import BadRow, json_line
from mgm_exp.errors import MgmError
from mgm_exp.store import write_atomic

if TYPE_CHECKING:
    from PIL import Image

_SHARDS_IN_A_FOLDER = 1000
_MOST_ROWS = 10_000  # of a batch, where most of them want no caption
_BATCHES_AHEAD = 2  # whose images are decoded while the captioner works
_BATCHES_OF_FILES = 500  # that a captioner of files is given at once


class Captioner(Protocol):
    """Anything that describes images in words, the same each time.

    Attributes:
        name: What it calls itself in messages and records.
        can_answer: Whether it can be asked questions.
    """

    name: str
    can_answer: bool

    def caption(self, images: list[Image.Image], *, seeds: Sequence[int] | None = None) -> list[str]:
        """One caption for each image: greedy, or sampled with a seed for each image.

        A caption depends on its image and its seed, not on the images beside it.
        """
        ...

    def answer(self, images: list[Image.Image], questions: Sequence[str]) -> list[str]:
        """The greedy answer to one question about each image."""
        ...


@runtime_checkable
class FileCaptioner(Protocol):
    """A captioner that opens image files itself, and keeps its own captions through an interruption."""

    name: str
    can_answer: bool

    def caption_files(
        self, rows: Sequence[Row], *, image_root: Path, work: Path, max_megapixels: float
    ) -> Iterator[dict[str, Any]]:
        """For each row, in order, ``{"id", "caption"}`` or the fault of its image: ``{"id", "kind", "detail"}``."""
        ...


class Scorer(Protocol):
    """Says how well texts fit an image; more is better."""

    def score(self, images: list[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """A score for each text of each image."""
        ...


@dataclass(frozen=True)
class Batch:
    """Consecutive rows, and those of them whose images are looked at."""

    number: int
    rows: list[Row | BadRow]
    wanted: list[Row]

    def shard(self, choice: CaptionChoice) -> str:
        """Its file's name: equal only for the same rows in the same batch, asked for the same."""
        keys = [[row.id, row.image] for row in self.wanted]
        digest = hashlib.sha256(json.dumps([keys, asdict(choice)]).encode()).hexdigest()[:16]
        return f"{self.number // _SHARDS_IN_A_FOLDER:04d}/{self.number:07d}-{digest}.jsonl"


def batches_of(rows: Iterable[Row | BadRow], batch_size: int, choice: CaptionChoice) -> Iterator[Batch]:
    """Rows in batches of which ``batch_size`` images are looked at."""
    gathered: list[Row | BadRow] = []
    wanted: list[Row] = []
    number = 0
    for row in rows:
        gathered.append(row)
        if isinstance(row, Row) and can_be_recaptioned(row) and choice.wants_anything(row.id):
            wanted.append(row)
        if len(wanted) == batch_size or len(gathered) == _MOST_ROWS:
            yield Batch(number, gathered, wanted)
            gathered, wanted, number = [], [], number + 1
    if gathered:
        yield Batch(number, gathered, wanted)


Shard = dict[int, Said]


@dataclass(frozen=True)
class CaptionBatches:
    """What captioner and scorer say of batches, from the files of an interrupted attempt or from themselves.

    Args:
        captioner: Describes the images.
        scorer: The judge; None where nothing is judged.
        choice: What is wanted of each row.
        loader: Opens the images.
        work: Folder that survives an interruption.
    """

    captioner: Captioner | FileCaptioner
    scorer: Scorer | None
    choice: CaptionChoice
    loader: ImageLoader
    work: Path

    def all(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Shard, bool]]:
        """Each batch with what was said, and whether it was said before; images are decoded ahead."""
        if isinstance(self.captioner, FileCaptioner):
            yield from self._all_from_files(self.captioner, batches)
            return
        ahead: deque[tuple[Batch, Shard | Callable[[], list[Opened]]]] = deque()
        for batch in batches:
            found = _read_shard(self._place(batch), batch)
            ahead.append((batch, self.loader.begin(_paths(batch.wanted)) if found is None else found))
            if len(ahead) > _BATCHES_AHEAD:
                yield self._said(*ahead.popleft())
        while ahead:
            yield self._said(*ahead.popleft())

    def _all_from_files(
        self, captioner: FileCaptioner, batches: Iterator[Batch]
    ) -> Iterator[tuple[Batch, Shard, bool]]:
        """The same, of a captioner that is given rows by the thousand; images are opened for the scorer only."""
        number = 0
        while group := list(islice(batches, _BATCHES_OF_FILES)):
            results = captioner.caption_files(
                [row for batch in group for row in batch.wanted],
                image_root=Path(self.loader.root),
                work=self.work / "files" / f"{number:05d}",
                max_megapixels=self.loader.max_megapixels,
            )
            number += 1
            for batch in group:
                given = list(islice(results, len(batch.wanted)))
                if [said["id"] for said in given] != [row.id for row in batch.wanted]:
                    raise MgmError(f"{captioner.name} gave captions of other rows than those that it was asked for.")
                found = _read_shard(self._place(batch), batch)
                if found is None:
                    shard = self._judged(batch, given)
                    _write_shard(self._place(batch), shard)
                    yield batch, shard, False
                else:
                    yield batch, found, True

    def _judged(self, batch: Batch, given: list[dict[str, Any]]) -> Shard:
        """What a captioner of files said of a batch, with scores where they are wanted."""
        shard: Shard = {}
        captions: dict[int, tuple[str, ...]] = {}
        for row, said in zip(batch.wanted, given, strict=True):
            if "caption" in said:
                captions[row.index] = (str(said["caption"]),)
            else:
                shard[row.index] = Said(row.id, kind=said["kind"], detail=said["detail"])
        described = [row for row in batch.wanted if row.index in captions]
        if not self.choice.is_scored:
            return shard | {row.index: Said(row.id, captions[row.index]) for row in described}
        pairs = []
        for row, image in zip(described, self.loader.begin(_paths(described))(), strict=True):
            if isinstance(image, ImageFault):
                shard[row.index] = Said(row.id, kind=image.kind, detail=image.detail)
            else:
                pairs.append((row, image))
        scores = self._scores(pairs, captions)
        for row, _ in pairs:
            raw, *new = scores[row.index]
            shard[row.index] = Said(row.id, captions[row.index], raw_score=raw, scores=tuple(new))
        return shard

    def _place(self, batch: Batch) -> Path:
        return self.work / "shards" / batch.shard(self.choice)

    def _said(self, batch: Batch, found: Shard | Callable[[], list[Opened]]) -> tuple[Batch, Shard, bool]:
        if not callable(found):
            return batch, found, True
        shard = self._ask(batch, found())
        _write_shard(self._place(batch), shard)
        return batch, shard, False

    def _ask(self, batch: Batch, images: list[Opened]) -> Shard:
        """Captions, answers and scores of a batch's images, or the faults of those that cannot be opened."""
        shard: Shard = {}
        opened: list[tuple[Row, Image.Image]] = []
        for row, image in zip(batch.wanted, images, strict=True):
            if isinstance(image, ImageFault):
                shard[row.index] = Said(row.id, kind=image.kind, detail=image.detail)
            else:
                opened.append((row, image))
        described = [(row, image) for row, image in opened if self.choice.wants_captions(row.id)]
        captions = self._captions(described)
        answers = self._answers(opened)
        scores = self._scores(described, captions)
        for row, _ in opened:
            raw, *new = scores.get(row.index, [None])
            shard[row.index] = Said(row.id, captions.get(row.index, ()), answers.get(row.index, ()), raw, tuple(new))
        return shard

    def _captions(self, pairs: list[tuple[Row, Image.Image]]) -> dict[int, tuple[str, ...]]:
        if not pairs:
            return {}
        images = [image for _, image in pairs]
        assert not isinstance(self.captioner, FileCaptioner)
        rounds = [self.captioner.caption(images)]
        for number in range(2, self.choice.captions_per_image + 1):
            seeds = [self.choice.seed_of(row.id, number) for row, _ in pairs]
            rounds.append(self.captioner.caption(images, seeds=seeds))
        return self._by_row(pairs, rounds, "captions")

    def _answers(self, pairs: list[tuple[Row, Image.Image]]) -> dict[int, tuple[str, ...]]:
        if not pairs or not self.choice.questions:
            return {}
        images = [image for _, image in pairs]
        assert not isinstance(self.captioner, FileCaptioner)
        rounds = [self.captioner.answer(images, [question] * len(images)) for question in self.choice.questions]
        return self._by_row(pairs, rounds, "answers")

    def _by_row(
        self, pairs: list[tuple[Row, Image.Image]], rounds: list[list[str]], what: str
    ) -> dict[int, tuple[str, ...]]:
        for texts in rounds:
            if len(texts) != len(pairs):
                raise MgmError(f"The captioner gave {len(texts)} {what} for {len(pairs)} images.")
        return {row.index: texts for (row, _), texts in zip(pairs, zip(*rounds, strict=True), strict=True)}

    def _scores(
        self, pairs: list[tuple[Row, Image.Image]], captions: dict[int, tuple[str, ...]]
    ) -> dict[int, list[float | None]]:
        """The scores of each row's raw caption (None where it has none) and of its new ones."""
        if not self.choice.is_scored or not pairs:
            return {}
        assert self.scorer is not None
        texts = [[one_line(text) for text in (caption_of(row), *captions[row.index])] for row, _ in pairs]
        # What is no caption is not shown to the judge.
        shown = [[text for text in row_texts if fault_of(text) is None] for row_texts in texts]
        found = iter(self.scorer.score([image for _, image in pairs], shown))
        scores: dict[int, list[float | None]] = {}
        for (row, _), row_texts in zip(pairs, texts, strict=True):
            given = iter(next(found))
            # Six digits: more would make a judgement depend on rounding, which depends on the batch.
            scores[row.index] = [None if fault_of(text) is not None else round(next(given), 6) for text in row_texts]
        return scores


def _paths(rows: list[Row]) -> list[str]:
    return [row.image or "" for row in rows]


def _write_shard(path: Path, shard: Shard) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json_line({"index": index, **shard[index].to_json()}) for index in sorted(shard)]
    write_atomic(path, "".join(lines))


def _read_shard(path: Path, batch: Batch) -> Shard | None:
    """A finished batch's captions; None where there is no file, or not a whole one of exactly these rows."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        shard = {line.pop("index"): Said.from_json(line) for line in lines}
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None
    expected = {row.index: row.id for row in batch.wanted}
    return shard if {index: said.id for index, said in shard.items()} == expected else None
