"""Why a row is not used: every kind of rejection, in words. docs/data.md lists the same kinds.

A kind is a stable name that reports count by; what exactly was found in a row stands in its ``detail``.
"""

from __future__ import annotations

FILE_KINDS: dict[str, str] = {
    "not_json": "the row is not valid JSON",
    "not_an_object": "the row is valid JSON, but not an object with keys",
    "encoding": "the row is not valid UTF-8",
    "row_too_large": "the row is longer than 4 MiB",
    "nested_too_deep": "the row's JSON is nested deeper than 32 levels",
    "duplicate_key": "a JSON object of the row holds a key twice, so its meaning depends on the reader",
    "bad_number": "a number is NaN, infinite or too long",
    "lone_surrogate": "a text holds half of a surrogate pair and cannot be written as UTF-8",
    "file_ends_early": "the file ends inside its list of rows: it was cut, and nobody knows how much is missing",
}
"""Faults that a reader finds in the file itself."""

ROW_KINDS: dict[str, str] = {
    "no_conversations": "the row has neither conversations nor a caption",
    "bad_id": "the id is not a text or a number",
    "duplicate_id": "another row before it has the same id",
    "bad_turn": "a turn is not an object with the texts 'from' and 'value'",
    "unknown_speaker": "a speaker is neither 'human' nor 'gpt'",
    "turn_order": "the speakers do not take turns, beginning with 'human'",
    "ends_with_human": "the last turn is a question, so it has no answer to learn",
    "empty_answer": "an answer holds no text",
    "empty_question": "a question without an image holds no text",
    "empty_caption": "the caption holds no text",
    "bad_image_field": "the image is not the text of a path (or a list of one)",
    "several_images": "the row names more than one image; one image a row is supported",
    "two_images_in_a_turn": "one turn holds <image> more than once",
    "image_token_repeated": "more than one turn holds <image>, and the row has one image",
    "image_token_in_answer": "an answer holds <image>",
    "image_token_without_image": "a turn holds <image>, and the row has no image",
    "no_image": "a caption row names no image, so there is nothing that the caption describes",
    "unsupported_media": "the row holds video or audio",
    "no_label": "no token of the row would be learnt: its text holds markers of the chat template",
    "labels_truncated": "every answer lies beyond the longest sequence (max_length), so nothing would be learnt",
}
"""Faults of what a row says."""

IMAGE_KINDS: dict[str, str] = {
    "missing": "the image file is not there",
    "bad_path": "the image path holds what no path may hold (NUL, a backslash, too many characters)",
    "outside_root": "the image path holds '..' or leads out of the image root",
    "not_a_file": "the image path is a folder, a device or a pipe",
    "zero_bytes": "the image file is empty",
    "unreadable": "the file is not a JPEG, PNG, WebP, BMP, GIF or TIFF image, is damaged, or may not be read",
    "truncated": "the image file ends before the image does",
    "too_large": "the image has more pixels than data.max_megapixels allows (or its file more than 512 MiB)",
    "too_elongated": "the image is so long and narrow that it would need a far larger square canvas",
    "animated": "the image has several frames or pages",
    "wrong_mode": "the pixels have no defined conversion to 8-bit RGB (float, 32-bit integer, Lab)",
}
"""Faults of a row's image."""

KINDS: dict[str, str] = {**FILE_KINDS, **ROW_KINDS, **IMAGE_KINDS}

FATAL_KINDS = frozenset({"file_ends_early"})
"""These stop a curation under every policy: counting one bad row would hide that many were lost."""
