"""Where the configuration lies, and what has to be in place before Hydra is imported.

``conf/``, ``sweeps/`` and the Hydra plugins lie beside the package in a checkout and inside it once installed. Hydra
finds plugins only in the namespace package ``hydra_plugins``, and reads ``zero=2`` as a number where a file name is
meant; both are put right here, so that every way in (``python -m mgm_exp``, ``mgm-exp``, notebooks, tests) is alike.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mgm_exp import deferred

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE if (_PACKAGE / "conf" / "config.yaml").is_file() else _PACKAGE.parent
CONF = ROOT / "conf"
SWEEPS = ROOT / "sweeps"
LAUNCHER = ROOT / "launcher"
# Environment variable by which a trial knows which process started it: it ends with it.
PARENT = "MGM_EXP_PARENT"
# Environment variable that makes a process a worker of a sweep: the number of the socket over which it gets its runs.
WARM = "MGM_EXP_WARM"
# Set in jobs of a batch system: a run waits until the processes of the job before it have left its folder.
WAIT = "MGM_EXP_WAIT"

_ASSIGNMENT = re.compile(r"(?P<key>\+{0,2}(?P<group>[A-Za-z_][\w/]*)(?:@[\w.:]*)?)=(?P<value>.+)", re.DOTALL)
_NUMBERS = re.compile(r"\s*\d+\s*(?:,\s*\d+\s*)*")
_CHOICE = re.compile(r"\s*choice\((?P<numbers>[^()]*)\)\s*")
_QUOTED_OR_NUMBER = re.compile(r"""\s*(?:"'?|'"?)?(?P<number>\d+)(?:'?"|"?')?\s*""")


def offline() -> None:
    """Nothing is fetched from a model hub, also not by a library that would: every model is a local folder.

    Whoever sets ``HF_HUB_OFFLINE=0`` is obeyed.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, os.environ.get("HF_HUB_OFFLINE", "1"))


def plugins() -> None:
    """Makes the Hydra plugins of this package importable, here and in child processes.

    In a checkout (and in an editable install, whose import hook hides the folder from Hydra's scan) ``launcher/`` is
    appended to ``sys.path`` and the folders to ``PYTHONPATH``; an installed package needs nothing. Call it before Hydra
    is imported.

    Also lets idle OpenMP threads sleep instead of spin (unless OMP_WAIT_POLICY says otherwise): beside another busy
    process, spinning threads of torch made steps some 50 times slower, sleeping ones about twice. It is read when
    torch is first imported. And what torch and transformers import without need waits until it is used
    (:mod:`mgm_exp.deferred`).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    offline()
    deferred.install()
    if not (LAUNCHER / "hydra_plugins").is_dir():
        return
    if str(LAUNCHER) not in sys.path:
        sys.path.append(str(LAUNCHER))
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    missing = [path for path in (str(ROOT), str(LAUNCHER)) if path not in inherited]
    if missing:
        os.environ["PYTHONPATH"] = os.pathsep.join([*inherited, *missing])


def register() -> None:
    """Registers the typed schema with Hydra. Repeating it changes nothing."""
    from hydra.core.config_store import ConfigStore

    from mgm_exp.config import ExperimentConfig
    from mgm_exp.local import LocalConfig
    from mgm_exp.packed.settings import PackedConfig
    from mgm_exp.slurm.settings import SlurmConfig
    from mgm_exp.volcano.settings import VolcanoConfig
    from mgm_exp.warm.settings import WarmConfig

    store = ConfigStore.instance()
    if "base_schema.yaml" not in store.repo:
        store.store(name="base_schema", node=ExperimentConfig, provider="mgm_exp")
        store.store(group="hydra/launcher", name="slurm_schema", node=SlurmConfig, provider="mgm_exp")
        store.store(group="hydra/launcher", name="local_schema", node=LocalConfig, provider="mgm_exp")
        store.store(group="hydra/launcher", name="warm_schema", node=WarmConfig, provider="mgm_exp")
        store.store(group="hydra/launcher", name="packed_schema", node=PackedConfig, provider="mgm_exp")
        store.store(group="hydra/launcher", name="volcano_schema", node=VolcanoConfig, provider="mgm_exp")


@contextmanager
def logging_kept() -> Iterator[None]:
    """Hydra sets up logging for its process; afterwards a notebook or a test finds its own again."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def one_version_of_hydra() -> Iterator[None]:
    """``version_base`` keeps Hydra 1.3 and 1.4 alike; 1.4 warns that 1.5 will not know it, which pyproject excludes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The version_base parameter is deprecated")
        yield


def quote_numeric_choices(overrides: Iterable[str]) -> list[str]:
    """Quotes numbers that name files: ``zero=2`` becomes ``zero='2'``, which Hydra takes as the choice it is.

    ``zero=2,3`` becomes ``zero='2','3'`` and ``zero=choice(2,3)`` becomes ``zero=choice("'2'","'3'")`` (a function's
    arguments lose one pair of quotes). Only groups are touched: they never take a number, as the key ``seed`` does.
    """
    return [_quoted(override) for override in overrides]


def _quoted(override: str) -> str:
    match = _ASSIGNMENT.fullmatch(override)
    if match is None or not _is_group(match["group"]):
        return override
    if _NUMBERS.fullmatch(match["value"]):
        numbers = [number.strip() for number in match["value"].split(",")]
        return f"{match['key']}=" + ",".join(f"'{number}'" for number in numbers)
    choice = _CHOICE.fullmatch(match["value"])
    if choice is None:
        return override
    items = []
    for item in choice["numbers"].split(","):
        number = _QUOTED_OR_NUMBER.fullmatch(item)
        items.append(f"\"'{number['number']}'\"" if number else item.strip())
    return f"{match['key']}=choice({','.join(items)})"


def _is_group(name: str) -> bool:
    return name == SWEEPS.name or (CONF / name).is_dir()
