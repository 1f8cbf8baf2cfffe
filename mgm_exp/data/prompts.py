"""The questions that caption rows are asked with: a caption brings none, and training needs one."""

from __future__ import annotations

import hashlib

CAPTION_PROMPTS = ("describe the picture", "give a caption", "show this image in words", "caption this image")
"""Questions of caption rows. Which one a row gets is chosen by a hash of its id."""


def caption_prompt(row_id: str) -> str:
    """The question that the caption of this id answers."""
    return CAPTION_PROMPTS[int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") % len(CAPTION_PROMPTS)]
