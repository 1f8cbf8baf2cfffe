"""What a worker keeps from one run for the next: merged configuration files, base models' tensors, tokenised rows.

Nothing is kept in a process that is no worker.
"""

from __future__ import annotations


def keep() -> None:
    """From now on this process keeps things."""
    from mgm_exp.config_loader import keep_files
    from mgm_exp.data import kept_rows
    from mgm_exp.model import resident

    keep_files()
    resident.keep()
    kept_rows.keep()


def check() -> bool:
    """After a run: what is kept is what it was, or it is let go, and that is said. Whether the run let go of any."""
    from mgm_exp.model import resident

    return resident.check()


def kept_gib() -> tuple[float, float]:
    """GiB of host memory and of GPU memory that are kept on purpose."""
    from mgm_exp.data import kept_rows
    from mgm_exp.model import resident

    host, gpu = resident.kept_gib()
    return host + kept_rows.kept_gib(), gpu


def said() -> list[str]:
    """Sentences for the user, each once."""
    from mgm_exp.model import resident

    return resident.said()
