"""Recaptioning: a captioner writes new captions for images, and nothing of it is lost when the process is killed.

    recaption(read_rows(path), captioner, image_root=root, work=work, out=out, choice=CaptionChoice())

Rows are taken in batches; what the captioner says of a batch is one file, written whole or not at all, so that a kill
costs one batch. What is written in the end equals that of an undisturbed run. The raw caption stays beside the new
one. Which caption a row ends up with is decided in :mod:`mgm_exp.data.caption_choice`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from mgm_exp.data.caption_choice import CaptionChoice, Said, can_be_recaptioned, caption_of, fault_of, one_line
from mgm_exp.data.formats import Row
from mgm_exp.data.image_loader import ImageLoader, Opened
from mgm_exp.data.images import ImageFault
from mgm_exp.data.records import BadRow, json_line
from mgm_exp.errors import ConfigError, MgmError
from mgm_exp.store import disk_full_named, write_atomic

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS, REJECTED, FATES = "captions.jsonl", "rejected.jsonl", "fates.jsonl"
_SHARDS_IN_A_FOLDER = 1000
_MOST_ROWS = 10_000  # of a batch, where most of them want no caption
_BATCHES_AHEAD = 2  # whose images are decoded while the captioner works


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


class Scorer(Protocol):
    """Says how well texts fit an image; more is better."""

    def score(self, images: list[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """A score for each text of each image."""
        ...


@dataclass(frozen=True)
class RecaptionReport:
    """What became of the rows; recaptioned, kept_raw, unchanged and rejected are all of them.

    Args:
        rows: Rows read.
        recaptioned: Rows whose caption was replaced by a new one.
        kept_raw: Rows that could have a new caption and keep their own: the share that ``mix`` leaves, or those whose
            new caption was no better, or none.
        unchanged: Rows that are no image with one answer (text only, several rounds); they are passed on as they are.
        rejected: Rows that cannot be read or whose image cannot; they stand in ``rejected.jsonl``.
        added: Rows of further captions and of questions.
        not_added: Further captions and answers that became no row: empty, no better, or said already.
        from_before: Rows that an interrupted attempt had asked the captioner about.
    """

    rows: int
    recaptioned: int
    kept_raw: int
    unchanged: int
    rejected: int
    added: int
    not_added: int
    from_before: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def recaption(
    rows: Iterable[Row | BadRow],
    captioner: Captioner,
    *,
    image_root: Path,
    work: Path,
    out: Path,
    choice: CaptionChoice | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    max_megapixels: float = 50.0,
    max_samples: int | None = None,
    workers: int = 0,
    total: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> RecaptionReport:
    """Writes ``captions.jsonl``, ``rejected.jsonl`` and ``fates.jsonl`` (a line for every row) into ``out``.

    ``captions.jsonl`` holds the rows in order, each followed by those that were made out of it.

    Args:
        rows: As :func:`mgm_exp.data.formats.read_rows` gives them.
        captioner: Describes the images.
        image_root: Folder that image paths are relative to.
        work: Folder that survives an interruption; it belongs to these rows, this captioner and this scorer alone.
        out: Folder of the results.
        choice: Which captions are written, and which kept; None: every caption is replaced by one.
        scorer: The judge of ``keep_if_better``.
        batch_size: Rows of one call of the captioner.
        max_megapixels: Images with more pixels are refused.
        max_samples: Only the first so many rows; None: all.
        workers: Processes that decode images; 0: this one.
        total: Number of rows, for progress; 0: unknown.
        on_progress: Called with (what, rows done, rows in all).

    Raises:
        ConfigError: the choice needs a scorer, or questions a captioner that answers.
        MgmError: the captioner gave another number of captions than images.
    """
    choice = choice or CaptionChoice()
    _check(choice, captioner, scorer)
    counts = dict.fromkeys(RecaptionReport.__dataclass_fields__, 0)
    with ExitStack() as stack:
        stack.enter_context(disk_full_named(out))
        files = {name: _open_partial(stack, out / name) for name in (CAPTIONS, REJECTED, FATES)}
        loader = stack.enter_context(ImageLoader(image_root, max_megapixels, workers))
        asked = _Asked(captioner, scorer, choice, loader, work / "shards")
        for batch, shard, is_from_before in asked.all(_batches(islice(rows, max_samples), batch_size, choice)):
            counts["from_before"] += len(shard) * is_from_before
            for row in batch.rows:
                outcome = choice.outcome(row, shard.get(row.index))
                counts["rows"] += 1
                counts[outcome.count] += 1
                counts["added"] += max(0, len(outcome.lines) - 1)
                counts["not_added"] += outcome.not_added
                files[CAPTIONS].writelines(map(json_line, outcome.lines))
                files[FATES].writelines(map(json_line, outcome.fates))
                if outcome.bad is not None:
                    files[REJECTED].write(json_line(outcome.bad))
            if on_progress is not None:
                on_progress("recaption", counts["rows"], max(total, counts["rows"]))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for name in files:
        os.replace(out / f"{name}.partial", out / name)
    return RecaptionReport(**counts)


def _check(choice: CaptionChoice, captioner: Captioner, scorer: Scorer | None) -> None:
    if choice.is_scored and scorer is None:
        raise ConfigError(
            "data.captioner.policy=keep_if_better needs a judge, and data.captioner.scorer.path is not given.",
            advice="Give a local CLIP or BLIP image-text-matching folder, or take policy=replace or mix.",
        )
    if choice.questions and not captioner.can_answer:
        raise ConfigError(
            f"data.captioner.questions holds {len(choice.questions)} questions, but {captioner.name} only describes "
            "images.",
            advice="Give data.captioner.path=FOLDER of a model that answers (BLIP-2, LLaVA, an MGM run, ...), "
            "or leave the questions out.",
        )


def _open_partial(stack: ExitStack, path: Path) -> IO[str]:
    return stack.enter_context(open(f"{path}.partial", "w", encoding="utf-8", newline="\n"))


@dataclass(frozen=True)
class _Batch:
    """Consecutive rows, and those of them whose images are looked at."""

    number: int
    rows: list[Row | BadRow]
    wanted: list[Row]

    def shard(self, choice: CaptionChoice) -> str:
        """Its file's name: equal only for the same rows in the same batch, asked for the same."""
        keys = [[row.id, row.image] for row in self.wanted]
        digest = hashlib.sha256(json.dumps([keys, asdict(choice)]).encode()).hexdigest()[:16]
        return f"{self.number // _SHARDS_IN_A_FOLDER:04d}/{self.number:07d}-{digest}.jsonl"


def _batches(rows: Iterable[Row | BadRow], batch_size: int, choice: CaptionChoice) -> Iterator[_Batch]:
    gathered: list[Row | BadRow] = []
    wanted: list[Row] = []
    number = 0
    for row in rows:
        gathered.append(row)
        if isinstance(row, Row) and can_be_recaptioned(row) and choice.wants_anything(row.id):
            wanted.append(row)
        if len(wanted) == batch_size or len(gathered) == _MOST_ROWS:
            yield _Batch(number, gathered, wanted)
            gathered, wanted, number = [], [], number + 1
    if gathered:
        yield _Batch(number, gathered, wanted)


Shard = dict[int, Said]


@dataclass(frozen=True)
class _Asked:
    """What captioner and scorer say of batches, from the files of an interrupted attempt or from themselves."""

    captioner: Captioner
    scorer: Scorer | None
    choice: CaptionChoice
    loader: ImageLoader
    folder: Path

    def all(self, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, Shard, bool]]:
        """Each batch with what was said, and whether it was said before; images are decoded ahead."""
        ahead: deque[tuple[_Batch, Shard | Callable[[], list[Opened]]]] = deque()
        for batch in batches:
            found = _read_shard(self.folder / batch.shard(self.choice), batch)
            ahead.append(
                (batch, self.loader.begin([row.image or "" for row in batch.wanted]) if found is None else found)
            )
            if len(ahead) > _BATCHES_AHEAD:
                yield self._said(*ahead.popleft())
        while ahead:
            yield self._said(*ahead.popleft())

    def _said(self, batch: _Batch, found: Shard | Callable[[], list[Opened]]) -> tuple[_Batch, Shard, bool]:
        if not callable(found):
            return batch, found, True
        shard = self._ask(batch, found())
        _write_shard(self.folder / batch.shard(self.choice), shard)
        return batch, shard, False

    def _ask(self, batch: _Batch, images: list[Opened]) -> Shard:
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
        rounds = [self.captioner.caption(images)]
        for number in range(2, self.choice.captions_per_image + 1):
            seeds = [self.choice.seed_of(row.id, number) for row, _ in pairs]
            rounds.append(self.captioner.caption(images, seeds=seeds))
        return self._by_row(pairs, rounds, "captions")

    def _answers(self, pairs: list[tuple[Row, Image.Image]]) -> dict[int, tuple[str, ...]]:
        if not pairs or not self.choice.questions:
            return {}
        images = [image for _, image in pairs]
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


def _write_shard(path: Path, shard: Shard) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json_line({"index": index, **shard[index].to_json()}) for index in sorted(shard)]
    write_atomic(path, "".join(lines))


def _read_shard(path: Path, batch: _Batch) -> Shard | None:
    """A finished batch's captions; None where there is no file, or not a whole one of exactly these rows."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        shard = {line.pop("index"): Said.from_json(line) for line in lines}
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None
    expected = {row.index: row.id for row in batch.wanted}
    return shard if {index: said.id for index, said in shard.items()} == expected else None
