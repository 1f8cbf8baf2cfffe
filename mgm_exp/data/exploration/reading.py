"""Reads every row of a dataset once and measures its captions on the way.

What is kept are arrays (words by number, values, hashes, ids), not the captions themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.data.exploration.blocks import (
    Batch,
    Block,
    batches_of,
    measured,
    read_span,
    spans_of,
    without_rows,
)
from mgm_exp.data.exploration.caption_table import CaptionTable, joined_tables
from mgm_exp.data.exploration.columns import Rows
from mgm_exp.data.exploration.processes import WorkerPool
from mgm_exp.data.exploration.token_lengths import TokenCounter
from mgm_exp.data.exploration.tokens import TokenStream, TokenStreamBuilder
from mgm_exp.data.formats import Location, Row, RowReader, read_rows
from mgm_exp.data.formats.id_set import IdSet, hash_text
from mgm_exp.data.records import BadRow

if TYPE_CHECKING:
    import numpy as np

    from mgm_exp.data.scoring import ImageTextScorer

OnProgress = Callable[[str, int, int], None]
_CHUNK = 8192
_MUCH = 8 << 20  # bytes of rows that are worth starting processes for


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Args:
        tokenizer: ``tokenizer.json`` to count tokens with; None: not counted.
        max_length: Longest sequence of the model, in tokens; None: unknown.
        with_images: Whether images are looked at.
        max_megapixels: Images with more pixels count as broken, as in curation.
        scorer: Judges how well captions fit their images; None: not judged.
        sample: Rows to look at, drawn at random; None: all.
        seed: Of the sample, and of the subsamples that diversity is measured on.
        workers: Processes; None: all usable cores.
    """

    tokenizer: Path | None = None
    max_length: int | None = None
    with_images: bool = True
    max_megapixels: float = 50.0
    scorer: ImageTextScorer | None = None
    sample: int | None = None
    seed: int = 0
    workers: int | None = None


@dataclass(frozen=True)
class Values:
    """What is known of every caption, in order.

    Args:
        stream: Its words.
        table: Its values, as Data-Juicer's operators define them.
        sentences: int32.
        hashes: uint64, equal for equal captions.
        tokens: int32, of the model's tokenizer; None: not counted.
        similarity: float32, how well it fits its image, NaN where it was not judged; None: no scorer.
    """

    stream: TokenStream
    table: CaptionTable
    sentences: np.ndarray
    hashes: np.ndarray
    tokens: np.ndarray | None
    similarity: np.ndarray | None = None


def read_captions(
    location: Location, options: Options, pool: WorkerPool, on_progress: OnProgress
) -> tuple[Rows, Values]:
    """Reads the rows and measures their captions.

    A caption is the text of a caption row, or an answer of a conversation (a row may have several, or none).

    Raises:
        DataError: the rows cannot be read at all.
    """
    reader = read_rows(location.path)
    counter = TokenCounter(options.tokenizer) if options.tokenizer is not None else None
    is_much = reader.bytes_total > _MUCH
    collected = _Collected()
    try:
        if options.sample is None and is_much and pool.workers > 1 and _is_one_file_of_lines(reader):
            blocks = pool.map(partial(read_span, count_tokens=counter), spans_of(reader.files[0]))
            for block in _with_progress(blocks, reader.bytes_total, on_progress):
                collected.add_part_of_file(block)
        else:
            rows = _counted(reader, collected.rows, on_progress)
            batches = batches_of(rows if options.sample is None else _drawn(rows, options.sample, options.seed), _CHUNK)
            for block in pool.map(partial(measured, count_tokens=counter), batches, is_worth_it=is_much):
                collected.add(block)
    finally:
        reader.close()
    return collected.rows, collected.values(counter)


def _is_one_file_of_lines(reader: RowReader) -> bool:
    return len(reader.files) == 1 and reader.container == "lines"


class _Collected:
    """Blocks, put together in their order."""

    def __init__(self) -> None:
        self.rows = Rows()
        self._ids = IdSet()
        self._builder = TokenStreamBuilder()
        self._tables: list[CaptionTable] = []
        self._sentences: list[np.ndarray] = []
        self._hashes: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []

    def add(self, block: Block) -> None:
        """Rows whose ids a reader has checked."""
        batch = block.batch
        self.rows.extend([name or "" for name in batch.ids], batch.images, batch.text_counts)
        self.rows.recaptioned += sum(batch.recaptioned)
        self._builder.add_stream(block.stream)
        self._tables.append(block.table)
        self._sentences.append(block.sentences)
        self._hashes.append(block.hashes)
        if block.tokens is not None:
            self._tokens.append(block.tokens)

    def add_part_of_file(self, block: Block) -> None:
        """The next part of a file: rows without an id are numbered, the second one with an id is a bad row."""
        import numpy as np

        batch = block.batch
        for place, name in enumerate(batch.ids):
            if name is None:  # as the reader calls it
                batch.ids[place] = f"row-{self.rows.total + batch.indices[place]:06d}"
                block.id_hashes[place] = hash_text(str(batch.ids[place]))
        is_new = np.fromiter(map(self._ids.add_hash, block.id_hashes), dtype=bool, count=len(block.id_hashes))
        self.rows.total += batch.total
        self.rows.bad.update(batch.bad)
        if not is_new.all():
            self.rows.bad["duplicate_id"] += int((~is_new).sum())
            block = without_rows(block, is_new)
        self.add(block)

    def values(self, counter: TokenCounter | None) -> Values:
        import numpy as np

        if not self._tables:
            self.add(measured(Batch(), counter))
        return Values(
            stream=self._builder.finish(),
            table=joined_tables(self._tables),
            sentences=np.concatenate(self._sentences),
            hashes=np.concatenate(self._hashes),
            tokens=np.concatenate(self._tokens) if self._tokens else None,
        )


def _with_progress(blocks: Iterable[Block], total_bytes: int, on_progress: OnProgress) -> Iterator[Block]:
    done = rows = 0
    for block in blocks:
        yield block
        done += block.span_bytes
        rows += block.batch.total
        on_progress("read captions", rows, max(rows, round(rows * total_bytes / max(1, done))))


def _counted(reader: RowReader, rows: Rows, on_progress: OnProgress) -> Iterator[Row]:
    for row in reader:
        rows.total += 1
        if rows.total % 2048 == 0:
            share = reader.bytes_read / max(1, reader.bytes_total)
            on_progress("read captions", rows.total, max(rows.total + 1, round(rows.total / max(share, 1e-9))))
        if isinstance(row, BadRow):
            rows.bad[row.kind] += 1
        else:
            yield row
    on_progress("read captions", max(rows.total, 1), max(rows.total, 1))


def _drawn(rows: Iterator[Row], size: int, seed: int) -> list[Row]:
    """``size`` rows, each with the same chance, in their order (reservoir sampling, Vitter's algorithm R)."""
    generator = random.Random(seed)
    kept: list[tuple[int, Row]] = []
    for number, row in enumerate(rows):
        if len(kept) < size:
            kept.append((number, row))
        elif (place := generator.randrange(number + 1)) < size:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda item: item[0])]
