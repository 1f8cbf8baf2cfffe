"""A worker whose runs do what their argument ``what=...`` says, and note what they saw of their process."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

from mgm_exp.signals import stop_on_signals

LEFT: list[bytes] = []


class BrokenGpu(ModuleType):
    """Stands for torch on a GPU that answers no call any more."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = self

    def is_initialized(self) -> bool:
        return True

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")


def body(arguments: list[str]) -> int:
    """One run."""
    given = dict(item.split("=", 1) for item in arguments)
    folder, what = Path(given["hydra.run.dir"].strip("'")), given["what"]
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LEFT_BEHIND")
    facts = {
        "pid": os.getpid(),
        "argv": sys.argv,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "first": Path("/proc/self/oom_score_adj").read_text(encoding="ascii").strip(),
        "folder": os.getcwd(),
        "random": random.random(),
        "handlers": len(logging.getLogger().handlers),
        "signal": str(signal.getsignal(signal.SIGTERM)),
        **{name: os.environ.get(name) for name in names},
    }
    (folder / "seen.json").write_text(json.dumps(facts), encoding="utf-8")
    print(f"run {given['what']} prints")
    warnings.warn("said in each run", stacklevel=1)
    return _do(what, folder)


def _do(what: str, folder: Path) -> int:
    if what == "mess":
        os.environ["LEFT_BEHIND"] = "1"
        del os.environ["OMP_NUM_THREADS"]
        os.chdir(folder)
        random.seed(1)
        logging.getLogger().addHandler(logging.NullHandler())
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        warnings.simplefilter("ignore")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "gone":
        os._exit(3)
    if what == "raises":
        raise ValueError("not foreseen")
    if what == "exits":
        sys.exit(7)
    if what == "refused":
        print("error: it was told to", file=sys.stderr)
        return 2
    if what == "leak":
        LEFT.append(b"1" * (300 * 2**20))
    if what == "eat":
        held = b"1" * (400 * 2**20)
        time.sleep(60)
        del held
    if what == "breaks":
        sys.modules["torch"] = BrokenGpu()
        return 1
    if what == "wait":
        with stop_on_signals():
            (folder / "waiting").touch()
            try:
                time.sleep(60)
            except Exception:  # noqa: BLE001 - Interrupted
                return 130
    return 0


if __name__ == "__main__":
    from mgm_exp.store import die_with_parent
    from mgm_exp.warm.worker import inherited_channel, serve

    die_with_parent(parent_pid=int(os.environ.pop("MGM_EXP_PARENT")))
    channel = inherited_channel()
    assert channel is not None
    sys.exit(serve(channel, body, loads_torch=False))
