"""The formats that data comes in: Data-Juicer, LLaVA/MGM, ShareGPT (LLaMA-Factory), Parquet and WebDataset shards.

    location = find_source("pairs.jsonl")       # a file, shards, or the folder that they lie in
    for row in read_rows(location.path):
        ...                                     # a Row, or a BadRow that says why it is none

Rows are streamed: memory does not grow with their number. docs/formats.md describes every format.
"""

from mgm_exp.data.formats.conversion import WriteReport, write_rows
from mgm_exp.data.formats.data_juicer_text import DJ_END, DJ_IMAGE, caption_text, dj_row
from mgm_exp.data.formats.reading import RowReader, read_rows
from mgm_exp.data.formats.rows import Row
from mgm_exp.data.formats.sources import Location, find_source, source_fingerprint
from mgm_exp.data.formats.writing import PACKED, TARGETS, RowWriter, Target

__all__ = [
    "DJ_END",
    "DJ_IMAGE",
    "PACKED",
    "TARGETS",
    "Location",
    "Row",
    "RowReader",
    "RowWriter",
    "Target",
    "WriteReport",
    "caption_text",
    "dj_row",
    "find_source",
    "read_rows",
    "source_fingerprint",
    "write_rows",
]
