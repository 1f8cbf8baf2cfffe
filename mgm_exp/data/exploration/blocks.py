"""A few thousand rows at a time: read, and their captions measured; a file of JSON lines is read by many processes.

Reading rows strictly takes longer than counting them. So a file of lines is cut at line ends, and each process reads,
checks and measures its own blocks; what belongs to the whole file (ids that occur twice, numbers of rows without an id,
the vocabulary) is put together afterwards. The result is that of reading the file from end to end.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.data.exploration.caption_table import CaptionTable, measure_captions
from mgm_exp.data.exploration.token_lengths import TokenCounter
from mgm_exp.data.exploration.tokens import TokenStream, token_stream
from mgm_exp.data.formats import Row
from mgm_exp.data.formats.aside import with_aside
from mgm_exp.data.formats.id_set import hash_text
from mgm_exp.data.formats.rows import Malformed, parse_row
from mgm_exp.data.strict_json import LineElements

if TYPE_CHECKING:
    import numpy as np

WORD_N = (2, 10)
CHARACTER_N = (5, 10)
"""Lengths of the n-grams whose repetition is measured: those of our recipes, and Data-Juicer's default."""

_BLOCK_BYTES = 2 << 20
_SENTENCE_END = re.compile(r"[.!?…。！？]+(?=\s|$)")


@dataclass
class Batch:
    """Rows that were read and not yet measured.

    Args:
        ids: Of the rows; None: the row has none of its own and gets one from its number in the file.
        indices: Number of each row in the block, with those that are none.
        images: Image paths; empty: none.
        text_counts: Captions of each row.
        captions: Of all rows, one after the other.
        total: All rows of the block.
        bad: Rows that are none, by kind.
        recaptioned: For each row whether it brings the caption that its own replaced.
    """

    ids: list[str | None] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    text_counts: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    total: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    recaptioned: list[bool] = field(default_factory=list)

    def add(self, row: Row, index: int | None = None) -> None:
        """A row; with its number in the block where that is all that is known of its place."""
        texts = texts_of(row)
        self.ids.append(row.id if row.has_id or index is None else None)
        self.indices.append(index or 0)
        self.images.append(row.image or "")
        self.text_counts.append(len(texts))
        self.captions += texts
        self.recaptioned.append(row.raw_caption is not None)


@dataclass
class Block:
    """Rows with their captions measured.

    Args:
        batch: The rows; the captions themselves are gone.
        id_hashes: Of the rows' ids; 0: the row has none.
        stream: Words of the captions, with a vocabulary of this block.
        table: Values of the captions.
        sentences: int32
        hashes: uint64, equal for equal captions.
        tokens: int32; None: not counted.
        span_bytes: Bytes of the file that it was read from.
    """

    batch: Batch
    id_hashes: list[int]
    stream: TokenStream
    table: CaptionTable
    sentences: np.ndarray
    hashes: np.ndarray
    tokens: np.ndarray | None
    span_bytes: int = 0


def texts_of(row: Row) -> list[str]:
    """What of a row counts as a caption: its caption, or the answers of its conversation."""
    if row.conversations is None:
        return [row.caption or ""]
    return [turn.text for turn in row.conversations if turn.speaker == "gpt"]


def measured(batch: Batch, count_tokens: TokenCounter | None) -> Block:
    """Measures the captions of a batch, which lets go of them."""
    import numpy as np

    captions, batch.captions = batch.captions, []
    return Block(
        batch=batch,
        id_hashes=[0 if name is None else hash_text(name) for name in batch.ids],
        stream=token_stream(captions),
        table=measure_captions(captions, word_n=WORD_N, character_n=CHARACTER_N),
        sentences=np.fromiter(map(sentences, captions), dtype=np.int32, count=len(captions)),
        hashes=np.fromiter(map(hash_text, captions), dtype=np.uint64, count=len(captions)),
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


@dataclass(frozen=True)
class Span:
    """A part of a file of JSON lines that begins and ends with a line."""

    path: Path
    start: int
    stop: int


def spans_of(path: Path, size: int = _BLOCK_BYTES) -> Iterator[Span]:
    """A file of JSON lines in parts of about ``size`` bytes."""
    with open(path, "rb") as file:
        end = file.seek(0, io.SEEK_END)
        start = 0
        while start < end:
            file.seek(min(start + size, end) - 1)
            while (rest := file.readline(size)) and not rest.endswith(b"\n"):
                pass  # a line may be longer than a block
            stop = file.tell()
            yield Span(path, start, stop)
            start = stop


def read_span(span: Span, count_tokens: TokenCounter | None) -> Block:
    """Reads and measures a part of a file of JSON lines."""
    with open(span.path, "rb") as file:
        file.seek(span.start)
        content = file.read(span.stop - span.start)
    batch = Batch()
    # A byte-order mark is one at the beginning of the file only: elsewhere the first line is made an empty one.
    for element in LineElements(io.BytesIO(content if span.start == 0 else b"\n" + content)):
        batch.total = element.index + 1
        if element.fault is not None:
            batch.bad[element.fault.kind] += 1
            continue
        try:
            batch.add(with_aside(parse_row(element.value, span.path.name, element)), element.index)
        except Malformed as error:
            batch.bad[error.kind] += 1
    return replace(measured(batch, count_tokens), span_bytes=len(content))


def without_rows(block: Block, is_kept: np.ndarray) -> Block:
    """A block without some of its rows.

    Args:
        block: All rows.
        is_kept: bool (rows,)
    """
    import numpy as np

    batch = block.batch
    texts = np.flatnonzero(np.repeat(is_kept, batch.text_counts))
    kept = np.flatnonzero(is_kept).tolist()
    table = block.table
    return Block(
        batch=Batch(
            ids=[batch.ids[i] for i in kept],
            indices=[batch.indices[i] for i in kept],
            images=[batch.images[i] for i in kept],
            text_counts=[batch.text_counts[i] for i in kept],
            total=batch.total,
            bad=batch.bad,
            recaptioned=[batch.recaptioned[i] for i in kept],
        ),
        id_hashes=[block.id_hashes[i] for i in kept],
        stream=TokenStream(block.stream.take(texts), block.stream.counts[texts], block.stream.vocabulary).trimmed(),
        span_bytes=block.span_bytes,
        table=CaptionTable(
            words=table.words[texts],
            text_length=table.text_length[texts],
            special_characters=table.special_characters[texts],
            word_repetition={n: column[texts] for n, column in table.word_repetition.items()},
            character_repetition={n: column[texts] for n, column in table.character_repetition.items()},
        ),
        sentences=block.sentences[texts],
        hashes=block.hashes[texts],
        tokens=None if block.tokens is None else block.tokens[texts],
    )


def batches_of(rows: Iterable[Row], size: int) -> Iterator[Batch]:
    """Rows that a reader gives, in batches of about ``size`` captions."""
    batch = Batch()
    for row in rows:
        batch.add(row)
        if len(batch.captions) >= size:
            yield batch
            batch = Batch()
    if batch.ids:
        yield batch
