"""Reads every row of a dataset once and measures its captions on the way.

What is kept in memory of a million captions is some 100 MB of arrays: words by number, values, hashes, ids.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.data.exploration.caption_table import CaptionTable, joined_tables, measure_chunk
from mgm_exp.data.exploration.columns import Rows
from mgm_exp.data.exploration.processes import WorkerPool
from mgm_exp.data.exploration.token_lengths import TokenCounter
from mgm_exp.data.exploration.tokens import TokenStream, TokenStreamBuilder, chunks
from mgm_exp.data.formats import Location, Row, RowReader, read_rows
from mgm_exp.data.records import BadRow

if TYPE_CHECKING:
    import numpy as np

    from mgm_exp.data.scoring import ImageTextScorer

WORD_N = (2, 10)
CHARACTER_N = (5, 10)
"""Lengths of the n-grams whose repetition is measured: those of our recipes, and Data-Juicer's default."""

OnProgress = Callable[[str, int, int], None]
_CHUNK = 8192
_MANY = 50_000  # rows that are worth starting processes for
_BYTES_A_ROW = 150  # a guess, to tell beforehand how many rows a file has
_SENTENCE_END = re.compile(r"[.!?…。！？]+(?=\s|$)")


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
        hashes: int64, equal for equal captions.
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
    import numpy as np

    rows, builder = Rows(), TokenStreamBuilder()
    reader = read_rows(location.path)
    hashes: list[np.ndarray] = []

    def captions() -> Iterator[list[str]]:
        for chunk in chunks(_captions(reader, rows, options, on_progress), _CHUNK):
            builder.add(chunk)
            hashes.append(np.fromiter(map(hash, chunk), dtype=np.int64, count=len(chunk)))
            yield chunk

    measure = partial(_measure, TokenCounter(options.tokenizer) if options.tokenizer is not None else None)
    try:
        is_worth_it = reader.bytes_total > _MANY * _BYTES_A_ROW
        measured = list(pool.map(measure, captions(), is_worth_it=is_worth_it)) or [measure([])]
    finally:
        reader.close()
    values = Values(
        stream=builder.finish(),
        table=joined_tables([item.table for item in measured]),
        sentences=np.concatenate([item.sentences for item in measured]),
        hashes=np.concatenate(hashes) if hashes else np.zeros(0, np.int64),
        tokens=None
        if options.tokenizer is None
        else np.concatenate([item.tokens for item in measured if item.tokens is not None]),
    )
    return rows, values


@dataclass(frozen=True)
class _Measured:
    table: CaptionTable
    sentences: np.ndarray
    tokens: np.ndarray | None


def _measure(count_tokens: TokenCounter | None, captions: list[str]) -> _Measured:
    import numpy as np

    return _Measured(
        table=measure_chunk(captions, WORD_N, CHARACTER_N),
        sentences=np.fromiter(map(sentences, captions), dtype=np.int32, count=len(captions)),
        tokens=None if count_tokens is None else count_tokens(captions),
    )


def sentences(text: str) -> int:
    """Sentences of a text: what ends with a full stop, a question or an exclamation mark, and a last part without one.

    It is a count of marks before white space; "St. Paul" counts as an end too.
    """
    text = text.strip()
    if not text:
        return 0
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return len(ends) + (not ends or ends[-1] < len(text))


def texts_of(row: Row) -> list[str]:
    """What of a row counts as a caption: its caption, or the answers of its conversation."""
    if row.conversations is None:
        return [row.caption or ""]
    return [turn.text for turn in row.conversations if turn.speaker == "gpt"]


def _captions(reader: RowReader, rows: Rows, options: Options, on_progress: OnProgress) -> Iterator[str]:
    """The captions of all rows, or of the sample; ``rows`` is filled on the way."""
    read = _counted(reader, rows, on_progress)
    for row in read if options.sample is None else _drawn(read, options.sample, options.seed):
        texts = texts_of(row)
        rows.add(row.id, row.image, len(texts))
        rows.recaptioned += row.raw_caption is not None
        yield from texts


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
