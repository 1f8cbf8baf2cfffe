"""How many tokens captions have under a model's own tokenizer, and how many are longer than the model takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np


def tokenizer_file(folder: Path) -> Path:
    """The fast tokenizer of a model folder.

    Raises:
        ModelError: there is none.
    """
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if not path.is_file() or path.suffix != ".json":
        raise ModelError(
            f"--tokenizer {folder}: no tokenizer.json is there.",
            advice="Give a model folder with a fast tokenizer (tokenizer.json).",
        )
    return path


def model_max_length(folder: Path) -> int | None:
    """The longest sequence that a model folder names: of its config, else of its tokenizer; None: neither does."""
    for name, key in (("config.json", "tokenizer_model_max_length"), ("tokenizer_config.json", "model_max_length")):
        path = folder / name
        if path.is_file():
            try:
                given = json.loads(path.read_text(encoding="utf-8")).get(key)
            except ValueError as error:
                raise ModelError(f"{path} is not valid JSON: {error}.") from error
            if isinstance(given, int) and 0 < given < 1_000_000_000:  # transformers writes 1e30 for "no limit"
                return given
    return None


class TokenCounter:
    """Counts the tokens of captions, without special tokens, in whatever process it is called.

    Args:
        file: ``tokenizer.json``.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._count: Callable[[list[str]], list[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "_count": None}  # a tokenizer is loaded where it is used

    def __call__(self, captions: list[str]) -> np.ndarray:
        """Tokens of each caption: int32."""
        import numpy as np

        if self._count is None:
            self._count = partial(_count, _load(self.file))
        return np.array(self._count(captions), dtype=np.int32)


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise ModelError(f"{file} cannot be loaded as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _count(tokenizer: Any, captions: list[str]) -> list[int]:
    try:
        return [len(encoding) for encoding in tokenizer.encode_batch(captions, add_special_tokens=False)]
    except (UnicodeError, TypeError) as error:
        raise DataError(f"Captions hold text that no tokenizer takes: {error}") from error
