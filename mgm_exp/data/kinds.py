"""What can be wrong with a row: every kind of fault, in words. docs/data.md lists the same kinds.

A kind is a stable name that reports count by; what exactly was found in a row stands in its ``detail``. Rows with a
fault of :data:`USABLE_KINDS` are trained on all the same: they are named, not left out.
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
    "byte_order_mark": "the file begins with a byte-order mark, which most readers of JSON refuse",
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
    "image_truncated": "the image's tokens do not fit into the longest sequence (max_length)",
    "special_token": "a text holds a special token of the model's tokenizer, which would act and not be read",
    "no_boundary": "where an answer begins and ends cannot be found exactly in the model's chat template",
    "unsupported_row": "the model takes no such row (several turns, or no image)",
}
"""Faults of what a row says."""

TEXT_KINDS: dict[str, str] = {
    "control_characters": "a text holds control characters (NUL, escape, a byte-order mark, ...)",
    "mojibake": "a text is UTF-8 that was read as Latin-1 or Windows-1252, or holds U+FFFD where characters were lost",
    "foreign_token": "a text holds another format's special token, which would be learnt as text",
}
"""Damage inside a text, see :mod:`mgm_exp.data.text_faults`."""

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

KINDS: dict[str, str] = {**FILE_KINDS, **ROW_KINDS, **TEXT_KINDS, **IMAGE_KINDS}

USABLE_KINDS = frozenset({*TEXT_KINDS, "byte_order_mark"})
"""Validation reports these; curation counts such rows and uses them."""

ADVICE: dict[str, str] = {
    **dict.fromkeys(FILE_KINDS, "correct the row in the file; --fix leaves it out"),
    **dict.fromkeys(ROW_KINDS, "correct the row; --fix leaves it out"),
    **dict.fromkeys(IMAGE_KINDS, "replace the image; --fix leaves the row out"),
    "encoding": "save the file as UTF-8; --fix leaves the row out",
    "byte_order_mark": "--fix removes it",
    "file_ends_early": "get the whole file; --fix keeps what is there",
    "duplicate_id": "give it an id of its own; --fix adds #2, #3, ...",
    "control_characters": "--fix removes them",
    "mojibake": "--fix decodes it where that is exact, and leaves the row out where characters are lost",
    "foreign_token": "--fix removes <|__dj__eoc|>, and leaves the row out for any other token",
    "no_label": "take the template's markers out of the text",
    "labels_truncated": "raise train.max_length, or shorten the row",
    "image_truncated": "raise train.max_length, or scale the image down",
    "missing": "check the image root (--images); --fix leaves the row out",
    "outside_root": "check the image root (--images), or move the image below it; --fix leaves the row out",
    "too_large": "scale the image down, or raise --max-megapixels; --fix leaves the row out",
}
"""What can be done about each kind."""

FATAL_KINDS = frozenset({"file_ends_early"})
"""These stop a curation under every policy: counting one bad row would hide that many were lost."""
