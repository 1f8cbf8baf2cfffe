"""Any folder with a model in it, of MGM or of transformers, as a model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_model(path: str | Path, device: str, base: str | Path | None = None) -> tuple[Any, Any]:
    """The model of a run or of a checkpoint, in eval mode, and its processor.

    Args:
        base: Base model of an adapter folder that names none which exists here.

    Raises:
        ModelError: the folder holds no model.
    """
    from mgm_exp.model.hf.loading import build_hf, is_hf_folder, open_processor
    from mgm_exp.model.hf.merge import hf_run, load_hf_run

    folder = Path(path).expanduser()
    if is_hf_folder(folder):
        model, _ = build_hf({"path": str(folder)}, device=device, dtype=None)
        return model, open_processor(folder)
    parts = hf_run(folder, base) if folder.is_dir() else None
    if parts is not None:
        return load_hf_run(parts, device=device), open_processor(parts.model or parts.base or folder)
    from mgm_exp.model.loading import load_model
    from mgm_exp.model.processor import load_processor

    return load_model(folder, device=device, base=base), load_processor(folder, base=base)
