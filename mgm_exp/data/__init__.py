"""The data room: formats, records, curation, recaptioning, batches.

Names are loaded on first use: reading rows must not import torch, and opening images must not import a tokenizer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgm_exp.data.batches import Batch, BatchPlan, StepLoader, collate
    from mgm_exp.data.curation import Policy, Source, curate
    from mgm_exp.data.dataset import ImageTextDataset
    from mgm_exp.data.formats import Location, Row, dj_row, find_source, read_rows, source_fingerprint
    from mgm_exp.data.image_checks import ImageChecks
    from mgm_exp.data.images import ImageFault, ImageInfo, open_image, probe_image
    from mgm_exp.data.kinds import KINDS
    from mgm_exp.data.processor import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Processor, supervised_tokens
    from mgm_exp.data.recaptioning import Captioner, RecaptionReport, recaption
    from mgm_exp.data.records import BadRow, Record, RecordFile, Turn, read_records, write_records
    from mgm_exp.data.reports import CurationReport, StageReport, read_report
    from mgm_exp.data.validation import validate
    from mgm_exp.data.validation_report import ValidationReport
    from mgm_exp.data.visual_tokens import VisualTokens, write_visual_tokens

_HOMES = {
    "Batch": "batches",
    "BatchPlan": "batches",
    "StepLoader": "batches",
    "collate": "batches",
    "CurationReport": "reports",
    "Policy": "curation",
    "Source": "curation",
    "StageReport": "reports",
    "curate": "curation",
    "read_report": "reports",
    "ImageTextDataset": "dataset",
    "Location": "formats",
    "Row": "formats",
    "dj_row": "formats",
    "find_source": "formats",
    "read_rows": "formats",
    "source_fingerprint": "formats",
    "ImageChecks": "image_checks",
    "ImageFault": "images",
    "ImageInfo": "images",
    "open_image": "images",
    "probe_image": "images",
    "KINDS": "kinds",
    "IGNORE_INDEX": "processor",
    "IMAGE_TOKEN_INDEX": "processor",
    "Processor": "processor",
    "supervised_tokens": "processor",
    "Captioner": "recaptioning",
    "RecaptionReport": "recaptioning",
    "recaption": "recaptioning",
    "BadRow": "records",
    "Record": "records",
    "RecordFile": "records",
    "Turn": "records",
    "read_records": "records",
    "write_records": "records",
    "validate": "validation",
    "ValidationReport": "validation_report",
    "VisualTokens": "visual_tokens",
    "write_visual_tokens": "visual_tokens",
}

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "KINDS",
    "BadRow",
    "Batch",
    "BatchPlan",
    "Captioner",
    "CurationReport",
    "ImageChecks",
    "ImageFault",
    "ImageInfo",
    "ImageTextDataset",
    "Location",
    "Policy",
    "Processor",
    "RecaptionReport",
    "Record",
    "RecordFile",
    "Row",
    "Source",
    "StageReport",
    "StepLoader",
    "Turn",
    "ValidationReport",
    "VisualTokens",
    "collate",
    "curate",
    "dj_row",
    "find_source",
    "open_image",
    "probe_image",
    "read_records",
    "read_report",
    "read_rows",
    "recaption",
    "source_fingerprint",
    "supervised_tokens",
    "validate",
    "write_records",
    "write_visual_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
