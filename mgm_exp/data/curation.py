"""Curation: from files of unknown quality to records that can all be trained on, with an account of every row.

    report = curate({"align": Source(rows, images, processor)}, out, policy=Policy())

A record in ``out`` has an image that opens, at most one image, at least one token to learn after truncation, and a
caption that the recipe allows. Every row has a fate in ``fates-<stage>.jsonl``; those that cannot be used stand in
``rejected.jsonl`` with their place, their kind and what was found. Nothing is replaced by something else. Rows keep
their order, and neither the order nor the verdicts depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from mgm_exp.data.augmentation import Augmentation
from mgm_exp.data.conversations import to_record
from mgm_exp.data.exploration import text_statistics
from mgm_exp.data.fates import EXAMPLES_FILE, Fates
from mgm_exp.data.formats import Row, RowReader, read_rows
from mgm_exp.data.image_checks import ImageChecks
from mgm_exp.data.image_table import Verdicts
from mgm_exp.data.images import image_size
from mgm_exp.data.kinds import FATAL_KINDS
from mgm_exp.data.processor import IGNORE_INDEX, InputsProcessor, Processor, merged_length, supervised_tokens
from mgm_exp.data.recipe import Limits
from mgm_exp.data.records import BadRow, Record, json_line, read_records
from mgm_exp.data.reports import REPORT, CurationReport, StageReport
from mgm_exp.data.text_faults import text_faults
from mgm_exp.errors import DataError, UnusableRow
from mgm_exp.store import disk_full_named, hard_link_or_copy, write_json_atomic

REJECTED = "rejected.jsonl"
ID_RENAMED = "id_renamed"
"""Change: an earlier row has the id; this one is called ``<id>#2``."""
DAMAGED_TEXT = "damaged_text"
"""Note: the text holds control characters, mojibake or the like; ``mgm-exp validate --fix`` repairs it."""

_CHUNK = 512  # rows that are read ahead and whose images are checked together

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Selection:
    """Which pairs of a stage are kept, and what is made of them.

    Args:
        values: ``values.jsonl`` of the operators, in the order of the rows; None: no operator is on.
        limits: What is allowed.
        augmentation: More rows out of those that are kept.
    """

    values: Path | None = None
    limits: Limits = field(default_factory=Limits)
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Recaptioned:
    """The account of recaptioning.

    Args:
        rejected: Its ``rejected.jsonl``: rows that are counted and named here too.
        fates: Its ``fates.jsonl``: scores, and why a row kept its own caption.
        changed: Rows whose caption was replaced.
        added: Rows that were made out of others.
    """

    rejected: Path
    fates: Path
    changed: int
    added: int


@dataclass(frozen=True)
class Source:
    """Where the rows of one stage come from.

    Args:
        path: File of rows, see :mod:`mgm_exp.data.formats`.
        image_root: Folder that its image paths are relative to.
        processor: Of the model that is trained; its ``model_max_length`` is the longest sequence of this stage.
        recaptioned: What recaptioning says of the rows, where it made ``path`` out of another file.
        name: What the rows are called in messages and reports; None: the name of ``path``.
        selection: What the recipe says of its rows.
        verdicts: What is known of its images; None: they are checked here.
    """

    path: Path
    image_root: Path
    processor: Processor | InputsProcessor
    recaptioned: Recaptioned | None = None
    name: str | None = None
    selection: Selection = field(default_factory=Selection)
    verdicts: Verdicts | None = None

    def is_same_as(self, other: Source) -> bool:
        """Whether curating it gives the same records."""
        mine, theirs = self.processor, other.processor
        return (
            os.path.realpath(self.path) == os.path.realpath(other.path)
            and os.path.realpath(self.image_root) == os.path.realpath(other.image_root)
            and self.recaptioned == other.recaptioned
            and self.selection == other.selection
            and mine.model_max_length == theirs.model_max_length
            and (mine is theirs or _visual_tokens(mine) == _visual_tokens(theirs))
        )


@dataclass(frozen=True)
class Policy:
    """What is done about rows that cannot be used.

    Args:
        bad_rows: ``skip`` names and counts them; ``fail`` stops at the first one.
        max_bad_share: ``skip`` stops the run where a larger share of a stage's rows is unusable.
        max_samples: Only the first so many rows of each stage are read; None: all.
        max_megapixels: Images with more pixels are refused before they are decoded.
    """

    bad_rows: str = "skip"
    max_bad_share: float = 0.1
    max_samples: int | None = None
    max_megapixels: float = 50.0


def curate(
    sources: Mapping[str, Source],
    out: Path,
    *,
    policy: Policy,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> CurationReport:
    """Writes ``<stage>.jsonl`` and ``fates-<stage>.jsonl`` for each source, ``rejected.jsonl`` and ``report.json``.

    Args:
        sources: For each stage, where its rows come from. Two stages with the same source are curated once.
        out: Existing folder; files of an earlier attempt are overwritten. The caller publishes it as a whole.
        policy: What is done about rows that cannot be used.
        workers: Processes that check images; None: all usable cores, two at least.
        on_progress: Called with (what, rows done, rows in all); the latter is an estimate until the end.

    Raises:
        DataError: a source cannot be read; a row is bad and ``bad_rows`` is ``fail``; too many rows are bad; or no row
            is left. ``rejected.jsonl`` is complete up to there.
    """
    reports: dict[str, StageReport] = {}
    examples: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack, disk_full_named(out):
        rejected = stack.enter_context(open(out / REJECTED, "w", encoding="utf-8", newline="\n"))
        checks: dict[str, ImageChecks] = {}
        for stage, source in sources.items():
            twin = next((name for name in reports if sources[name].is_same_as(source)), None)
            if twin is not None:
                for name in ("{}.jsonl", "fates-{}.jsonl"):
                    hard_link_or_copy(out / name.format(twin), out / name.format(stage))
                _repeat_rejected(out / REJECTED, rejected, twin, stage)
                reports[stage], examples[stage] = replace(reports[twin]), examples[twin]
                continue
            root = os.path.realpath(source.image_root)
            if source.verdicts is None and root not in checks:
                checks[root] = stack.enter_context(ImageChecks(root, policy.max_megapixels, workers))
            with (
                open(out / f"{stage}.jsonl.partial", "w", encoding="utf-8", newline="\n") as kept,
                Fates(out / f"fates-{stage}.jsonl") as fates,
            ):
                verdicts = source.verdicts or checks[root]
                work = _StageCuration(stage, source, policy, verdicts, rejected, fates, on_progress)
                work.run(kept)
            os.replace(out / f"{stage}.jsonl.partial", out / f"{stage}.jsonl")
            reports[stage] = work.report(read_records(out / f"{stage}.jsonl"))
            examples[stage] = fates.examples()
        report = CurationReport(reports)
        write_json_atomic(out / EXAMPLES_FILE, examples)
        write_json_atomic(out / REPORT, report.to_json())
    return report


def _repeat_rejected(path: Path, rejected: IO[str], twin: str, stage: str) -> None:
    rejected.flush()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rejected.writelines(json_line({**row, "stage": stage}) for row in rows if row["stage"] == twin)


Entry = tuple[Record, list[str]] | BadRow


class _StageCuration:
    """The rows of one stage on their way: read, checked, counted, written."""

    def __init__(
        self,
        stage: str,
        source: Source,
        policy: Policy,
        checks: Verdicts,
        rejected_file: IO[str],
        fates: Fates,
        on_progress: Progress | None,
    ) -> None:
        self.stage, self.source, self.policy, self.checks = stage, source, policy, checks
        self.rejected_file, self.fates, self.on_progress = rejected_file, fates, on_progress
        selection = source.selection
        before = source.recaptioned
        self.values = _InOrder(selection.values)
        self.said = _InOrder(before.fates if before else None)
        self.limits, self.augmentation = selection.limits, selection.augmentation
        self.rows = self.kept = self.truncated = self.supervised = self.tokens = 0
        self.rejected: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.examples: dict[str, BadRow] = {}
        self.images: set[str] = set()
        self.lengths = array("l")
        self.is_copy = bytearray()  # of each record that was written: whether augmentation made it
        self.digest = hashlib.sha256()

    def run(self, kept: IO[str]) -> None:
        """Curates all rows, writing records to ``kept``."""
        reader = read_rows(self.source.path, rename_duplicates=True)
        try:
            for bad in self._rejected_before():
                self.rows += 1
                self._reject(bad)
            ahead: deque[list[tuple[Row, Entry] | tuple[None, BadRow]]] = deque()
            for chunk in self._chunks(reader):
                ahead.append(chunk)
                self.checks.begin(
                    entry[0].image for _, entry in chunk if not isinstance(entry, BadRow) and entry[0].image is not None
                )
                if len(ahead) > 1:  # while its successor's images are checked, this chunk is tokenised
                    self._finish(ahead.popleft(), kept)
                    self._tell(reader)
            while ahead:
                self._finish(ahead.popleft(), kept)
        finally:
            reader.close()
        self._check_share()
        if self.on_progress is not None:
            self.on_progress(f"curate {self.stage}", self.rows, self.rows)

    def _rejected_before(self) -> Iterator[BadRow]:
        if self.source.recaptioned is not None:
            with open(self.source.recaptioned.rejected, encoding="utf-8") as file:
                for line in file:
                    yield BadRow.from_json(json.loads(line))

    def _chunks(self, reader: RowReader) -> Iterator[list[tuple[Row, Entry] | tuple[None, BadRow]]]:
        # Recaptioning has kept to the limit, and may have added rows to what it let through.
        limit = self.policy.max_samples if self.source.recaptioned is None else None
        rows = reader if limit is None else islice(reader, limit)
        while chunk := list(islice(rows, _CHUNK)):
            yield [(None, row) if isinstance(row, BadRow) else (row, _entry(row)) for row in chunk]

    def _finish(self, chunk: list[tuple[Row, Entry] | tuple[None, BadRow]], kept: IO[str]) -> None:
        for row, entry in chunk:
            self.rows += 1
            if isinstance(entry, BadRow):
                self._reject(entry)
                continue
            record, changes = entry
            assert row is not None
            sha256 = ""
            if record.image is not None:
                verdict = self.checks.verdict(record.image)
                if verdict.kind is not None:
                    self._reject(row.bad(verdict.kind, verdict.detail))
                    continue
                sha256 = verdict.sha256
                record = self._relative(record)
            values = self.values.of(record.id)
            said = (self.said.of(record.id) or {}).get("detail")
            drop = None if values is None else self.limits.judge(values)
            if drop is not None:
                self.fates.dropped(record, drop, row.line, said)
                continue
            if record.raw_caption is not None:
                changes = [*changes, "recaptioned"]
            for number, (made, how) in enumerate(self.augmentation.rows(record)):
                bad = self._count_tokens(row, made)
                if bad is not None:
                    if number == 0:
                        self._reject(bad, made)
                    break
                if number:
                    self.fates.added(made, [*changes, *how])
                else:
                    self.fates.kept(made, [*changes, *how], said)
                self.is_copy.append(number > 0)
                self._write(made, [*changes, *how], sha256, kept)

    def _write(self, record: Record, changes: list[str], sha256: str, kept: IO[str]) -> None:
        line = json_line(record.to_json())
        kept.write(line)
        self.kept += 1
        self.changed.update(changes)
        self.digest.update(line.encode() + sha256.encode())
        if record.image is not None:
            self.images.add(record.image)

    def _relative(self, record: Record) -> Record:
        """Absolute paths (Data-Juicer exports them) become relative to the root, which they were checked to lie in."""
        if record.image is None or not os.path.isabs(record.image):
            return record
        relative = os.path.relpath(os.path.realpath(record.image), self.checks.root)
        return replace(record, image=relative)

    def _count_tokens(self, row: Row, record: Record) -> BadRow | None:
        """Counts what is learnt of a record; a BadRow if it is nothing."""
        limit = self.source.processor.model_max_length
        try:
            length, supervised, has_label = self._measured(record)
        except UnusableRow as error:
            return row.bad(error.kind, error.message)
        if supervised == 0:
            if has_label or length >= limit:
                return row.bad("labels_truncated", f"{length} tokens with the image; max_length is {limit}")
            return row.bad("no_label", "the chat template masks every token: does the text hold its markers?")
        self.supervised += supervised
        self.tokens += min(length, limit)
        self.truncated += length > limit
        self.lengths.append(length)
        return None

    def _measured(self, record: Record) -> tuple[int, int, bool]:
        """Tokens of a record with its image, those that are learnt after truncation, and whether any could be."""
        processor = self.source.processor
        if isinstance(processor, InputsProcessor):
            size = None if record.image is None else image_size(self.checks.root, record.image)
            return processor.measure(record.turns(), size)
        encoded = processor.encode(record.turns(), has_image=record.image is not None)
        ids, labels, n_visual = encoded["input_ids"], encoded["labels"], processor.n_visual_tokens
        supervised = supervised_tokens(ids, labels, n_visual, processor.model_max_length)
        return merged_length(ids, n_visual), supervised, any(label != IGNORE_INDEX for label in labels)

    def _reject(self, bad: BadRow, record: Record | None = None) -> None:
        self.fates.rejected(bad, record)
        self.rejected_file.write(json_line({"stage": self.stage, **bad.to_json()}))
        self.rejected[bad.kind] += 1
        self.examples.setdefault(bad.kind, bad)
        if bad.kind in FATAL_KINDS:
            self.rejected_file.flush()
            raise DataError(f"{self.source.path} cannot be trusted: {bad}.", advice="Get the whole file, or repair it.")
        if self.policy.bad_rows == "fail":
            self.rejected_file.flush()
            raise DataError(
                f"A row of the {self.stage} data cannot be used: {bad}.",
                advice="Repair or remove the row, or go on without such rows with data.bad_rows=skip.",
            )

    def _check_share(self) -> None:
        self.rejected_file.flush()
        n_bad = sum(self.rejected.values())
        if self.kept and n_bad <= self.policy.max_bad_share * self.rows:
            return
        kinds = "; ".join(
            f"{count} {kind} (first: {self.examples[kind].place}: {self.examples[kind].detail})"
            for kind, count in self.rejected.most_common(4)
        )
        what = f"{n_bad} of {self.rows} rows of the {self.stage} data ({self.source.path}) cannot be used"
        if not self.kept and self.fates.n_dropped:
            by = ", ".join(f"{operator} dropped {count}" for operator, count in self.fates.dropped_by.items())
            raise DataError(
                f"The recipe keeps none of the {self.rows} rows of the {self.stage} data ({self.source.path}): {by}"
                + (f"; {n_bad} cannot be used." if n_bad else "."),
                advice=f"Loosen data.recipe ({', '.join(f'{b.value}: {b.in_words()}' for b in self.limits.bounds)}).",
            )
        if not self.kept:
            raise DataError(
                f"{what}; none is left. {kinds or 'The file holds no rows'}.",
                advice="If images are missing, check data.image_root." if "missing" in self.rejected else "",
            )
        raise DataError(
            f"{what}, more than data.max_bad_share={self.policy.max_bad_share:g} allows. {kinds}.",
            advice=f"Every row is named in {self.rejected_file.name}. Repair the data, or raise data.max_bad_share.",
        )

    def _tell(self, reader: RowReader) -> None:
        if self.on_progress is not None:
            share = reader.bytes_read / max(1, reader.bytes_total)
            self.on_progress(f"curate {self.stage}", self.rows, max(self.rows + 1, round(self.rows / max(share, 1e-9))))

    def _waterfall(self) -> list[dict[str, Any]]:
        before = self.source.recaptioned
        changed, added = (before.changed, before.added) if before else (None, 0)
        return self.fates.waterfall(self.rows - added, changed, added, self.limits)

    def _answers(self, records: Sequence[Record], *, is_raw: bool) -> Iterator[str]:
        """What is learnt of each record, or the caption that stood in its place; copies are left out."""
        for record, is_copy in zip(records, self.is_copy, strict=True):
            if is_copy:
                continue
            if is_raw and record.raw_caption is not None:
                yield record.raw_caption
            else:
                yield from (turn.text for turn in record.conversations if turn.speaker == "gpt")

    def report(self, records: Sequence[Record]) -> StageReport:
        """The account of the stage.

        Args:
            records: What :meth:`run` wrote.
        """
        lengths = np.asarray(self.lengths)
        marks = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
        spread = {name: float(np.percentile(lengths, share)) for name, share in marks.items()}
        return StageReport(
            file=self.source.name or self.source.path.name,
            image_root=self.checks.root,
            rows=self.rows,
            kept=self.kept,
            dropped=dict(self.fates.dropped_by),
            limits=self.limits.to_json(),
            waterfall=self._waterfall(),
            text=text_statistics(self._answers(records, is_raw=False)),
            raw_text=text_statistics(self._answers(records, is_raw=True)) if self.changed["recaptioned"] else None,
            rejected=dict(sorted(self.rejected.items())),
            changed={name: count for name, count in sorted(self.changed.items()) if count},
            images=len(self.images),
            max_length=self.source.processor.model_max_length,
            truncated=self.truncated,
            supervised_tokens=self.supervised,
            tokens=self.tokens,
            lengths={"mean": round(float(lengths.mean()), 2), **spread},
            fingerprint=self.digest.hexdigest(),
        )


def _entry(row: Row) -> Entry:
    """The record of a row with what had to be changed, and a note where its text is damaged but can be read."""
    made = to_record(row)
    if isinstance(made, BadRow):
        return made
    record, changes = made
    if row.renamed_from is not None:
        changes.append(ID_RENAMED)
    if any(text_faults(turn.text) for turn in record.conversations):
        changes.append(DAMAGED_TEXT)
    return record, changes


def _visual_tokens(processor: Processor | InputsProcessor) -> int | None:
    """Embeddings of one image; None where that depends on the image."""
    return None if isinstance(processor, InputsProcessor) else processor.n_visual_tokens


class _InOrder:
    """JSON lines with ids, of rows that come in the same order; some rows have none.

    Lines of rows that were dropped are passed over: they do not come.
    """

    def __init__(self, path: Path | None) -> None:
        self._lines = iter(()) if path is None else _json_lines(path)
        self._ahead = self._next()

    def of(self, row_id: str) -> dict[str, Any] | None:
        """The line of a row without its id; None: it has none."""
        if self._ahead is None or self._ahead["id"] != row_id:
            return None
        line, self._ahead = self._ahead, self._next()
        del line["id"]
        return line

    def _next(self) -> dict[str, Any] | None:
        return next((line for line in self._lines if line.get("fate") != "dropped"), None)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
