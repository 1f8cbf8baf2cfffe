"""The smallest workbook (xlsx) that spreadsheet programs and pandas read: one sheet of texts and whole numbers.

Texts are stored as texts: nothing in them can become a formula.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from xml.sax.saxutils import escape

LONGEST_CELL = 32_767
_NAMESPACE = "http://schemas.openxmlformats.org"
_TYPES = (
    f'<Types xmlns="{_NAMESPACE}/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/>'
    '<Override PartName="/xl/workbook.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>'
)
_ROOT = (
    f'<Relationships xmlns="{_NAMESPACE}/package/2006/relationships"><Relationship Id="rId1" '
    f'Type="{_NAMESPACE}/officeDocument/2006/relationships/officeDocument" Target="xl/workbook.xml"/></Relationships>'
)
_LINKS = (
    f'<Relationships xmlns="{_NAMESPACE}/package/2006/relationships"><Relationship Id="rId1" '
    f'Type="{_NAMESPACE}/officeDocument/2006/relationships/worksheet" Target="worksheets/sheet1.xml"/></Relationships>'
)
_BOOK = (
    f'<workbook xmlns="{_NAMESPACE}/spreadsheetml/2006/main" '
    f'xmlns:r="{_NAMESPACE}/officeDocument/2006/relationships"><sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/>'
    "</sheets></workbook>"
)
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
# What XML 1.0 cannot hold: control characters, lone surrogates, two non-characters.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def workbook(table: Sequence[Sequence[str | int]]) -> bytes:
    """An xlsx file with the rows of a table, the same bytes for the same table.

    Characters that XML cannot hold are dropped; texts are cut at the format's limit of 32,767 characters.
    """
    rows = "".join(_row(row, number) for number, row in enumerate(table, 1))
    sheet = f'<worksheet xmlns="{_NAMESPACE}/spreadsheetml/2006/main"><sheetData>{rows}</sheetData></worksheet>'
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (
            ("[Content_Types].xml", _TYPES),
            ("_rels/.rels", _ROOT),
            ("xl/workbook.xml", _BOOK),
            ("xl/_rels/workbook.xml.rels", _LINKS),
            ("xl/worksheets/sheet1.xml", sheet),
        ):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, _HEAD + content)
    return raw.getvalue()


def _row(row: Sequence[str | int], number: int) -> str:
    cells = "".join(_cell(value, f"{_column(place)}{number}") for place, value in enumerate(row))
    return f'<row r="{number}">{cells}</row>'


def _cell(value: str | int, place: str) -> str:
    if isinstance(value, int):
        return f'<c r="{place}"><v>{value}</v></c>'
    if not value:
        return ""
    text = escape(_ILLEGAL.sub("", value)[:LONGEST_CELL])
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def _column(place: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    name = ""
    place += 1
    while place:
        place, letter = divmod(place - 1, 26)
        name = chr(ord("A") + letter) + name
    return name
