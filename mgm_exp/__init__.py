"""Fine-tuning experiments on Mini-Gemini (MGM): data, align, instruct, evaluate, record, compare.

For notebooks: :func:`run` does what ``python -m mgm_exp`` does, :func:`sweep` what ``python -m mgm_exp -m`` does, and
``compare(paths)`` what ``mgm-exp report`` does. They are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgm_exp import compare
    from mgm_exp.command import run, sweep

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "run", "sweep"]


def __getattr__(name: str) -> Any:
    if name in ("run", "sweep"):
        from mgm_exp import command

        return getattr(command, name)
    if name == "compare":
        import importlib

        return importlib.import_module("mgm_exp.compare")
    raise AttributeError(f"module 'mgm_exp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
