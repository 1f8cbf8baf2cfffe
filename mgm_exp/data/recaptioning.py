"""Recaptioning: a captioner writes new captions for images, and nothing of it is lost when the process is killed.

    recaption(read_rows(path), captioner, image_root=root, work=work, out=out, choice=CaptionChoice())

Rows are taken in batches; what the captioner says of a batch is one file, written whole or not at all, so that a kill
costs one batch. What is written in the end equals that of an undisturbed run. The raw caption stays beside the new
one. Which caption a row ends up with is decided in :mod:`mgm_exp.data.caption_choice`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mgm_exp.data.caption_batches import CaptionBatches, Captioner, FileCaptioner, Scorer, batches_of
from mgm_exp.data.caption_choice import CaptionChoice
from mgm_exp.data.formats import Row
from mgm_exp.data.image_loader import ImageLoader
from mgm_exp.data.records import BadRow, json_line
from mgm_exp.errors import ConfigError
from mgm_exp.store import disk_full_named, usable_cores

__all__ = ["CAPTIONS", "FATES", "REJECTED", "Captioner", "FileCaptioner", "RecaptionReport", "Scorer", "recaption"]

CAPTIONS, REJECTED, FATES = "captions.jsonl", "rejected.jsonl", "fates.jsonl"


@dataclass(frozen=True)
class RecaptionReport:
    """What became of the rows; recaptioned, kept_raw, unchanged and rejected are all of them.

    Args:
        rows: Rows read.
        recaptioned: Rows whose caption was replaced by a new one.
        kept_raw: Rows that could have a new caption and keep their own: the share that ``mix`` leaves, or those whose
            new caption was no better, or none. ``why_kept`` counts the reasons.
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
    why_kept: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recaption(
    rows: Iterable[Row | BadRow],
    captioner: Captioner | FileCaptioner,
    *,
    image_root: Path,
    work: Path,
    out: Path,
    choice: CaptionChoice | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    max_megapixels: float = 50.0,
    max_samples: int | None = None,
    workers: int | None = None,
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
        workers: Processes that decode images; 0: this one does; None: none beside a captioner on the CPU, which needs
            the cores itself, and up to four beside one on a GPU (its ``device``).
        total: Number of rows, for progress; 0: unknown.
        on_progress: Called with (what, rows done, rows in all).

    Raises:
        ConfigError: the choice needs a scorer, or questions a captioner that answers.
        MgmError: the captioner gave another number of captions than images.
    """
    choice = choice or CaptionChoice()
    _check(choice, captioner, scorer)
    names = ("rows", "recaptioned", "kept_raw", "unchanged", "rejected", "added", "not_added", "from_before")
    counts, why_kept = dict.fromkeys(names, 0), Counter[str]()
    with ExitStack() as stack:
        stack.enter_context(disk_full_named(out))
        files = {name: _open_partial(stack, out / name) for name in (CAPTIONS, REJECTED, FATES)}
        workers = _workers_beside(captioner) if workers is None else workers
        loader = stack.enter_context(ImageLoader(image_root, max_megapixels, workers))
        said = CaptionBatches(captioner, scorer, choice, loader, work)
        for batch, shard, is_from_before in said.all(batches_of(islice(rows, max_samples), batch_size, choice)):
            counts["from_before"] += len(shard) * is_from_before
            for row in batch.rows:
                outcome = choice.outcome(row, shard.get(row.index))
                counts["rows"] += 1
                counts[outcome.count] += 1
                counts["added"] += max(0, len(outcome.lines) - 1)
                counts["not_added"] += outcome.not_added
                why_kept.update([outcome.why] if outcome.why else [])
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
    return RecaptionReport(**counts, why_kept=dict(sorted(why_kept.items())))


def _workers_beside(captioner: Captioner | FileCaptioner) -> int:
    is_on_cpu = str(getattr(captioner, "device", "cpu")).startswith("cpu")
    return 0 if is_on_cpu else min(4, usable_cores())


def _check(choice: CaptionChoice, captioner: Captioner | FileCaptioner, scorer: Scorer | None) -> None:
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
    if choice.captions_per_image > 1 and isinstance(captioner, FileCaptioner):
        raise ConfigError(
            f"data.captioner.captions_per_image={choice.captions_per_image}, but {captioner.name} writes one caption.",
            advice="Take data.captioner.engine=mgm_exp for several.",
        )


def _open_partial(stack: ExitStack, path: Path) -> IO[str]:
    return stack.enter_context(open(f"{path}.partial", "w", encoding="utf-8", newline="\n"))
