"""Each trap, and that it is closed: in the worker, and in the processes that it makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.data.data_juicer import child
from mgm_exp.errors import MgmError, MissingDependencyError

_GUARDED = """
import ctypes, json, os, sys
from mgm_exp.data.data_juicer import guards
guards.apply()
from PIL import ImageFile
from data_juicer.utils.lazy_loader import LazyLoader
found = {"truncated": ImageFile.LOAD_TRUNCATED_IMAGES, "offline": os.environ["HF_HUB_OFFLINE"]}
try:
    LazyLoader("there_is_no_such_module").anything
except ImportError as error:
    found["lazy"] = str(error)
try:
    LazyLoader.check_packages(["there-is-no-such-package"])
except ImportError as error:
    found["check"] = str(error)
reading, writing = os.pipe()
pid = os.fork()
if pid == 0:
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)  # PR_GET_PDEATHSIG
    os.write(writing, str(number.value).encode())
    os._exit(0)
os.waitpid(pid, 0)
found["death_signal"] = int(os.read(reading, 10))
print(json.dumps(found))
"""


def test_the_guards_are_in_force_after_data_juicer_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _GUARDED], capture_output=True, text=True, check=True, env=child.environment()
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "truncated": False,
        "offline": "1",
        "lazy": "run-time installation is blocked: there_is_no_such_module",
        "check": "run-time installation is blocked: there-is-no-such-package",
        "death_signal": 9,
    }


_SPAWNED = """
import json, sys
from multiprocess import get_context
def look(_):
    from PIL import ImageFile
    from data_juicer.utils.lazy_loader import LazyLoader
    return ImageFile.LOAD_TRUNCATED_IMAGES, LazyLoader._install_package.__func__.__qualname__
if __name__ == "__main__":
    from mgm_exp.data.data_juicer import worker
    # As `python -m mgm_exp.data.data_juicer.worker` looks to a process that is spawned from it.
    main = sys.modules["__main__"]
    main.__spec__ = worker.__spec__
    with get_context("spawn").Pool(1) as pool:
        print(json.dumps(pool.map(look, [0])))
"""


def test_a_process_that_data_juicer_spawns_has_the_guards_too(tmp_path: Path) -> None:
    """On GPUs it spawns, and a spawned process inherits nothing."""
    script = tmp_path / "spawning.py"
    script.write_text(_SPAWNED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env=child.environment(), timeout=120
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[False, "block_installs.<locals>.refuse"]]


def test_the_workers_environment_is_offline_and_without_what_changes_data_juicer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("_DJ_SPECIAL_TOKEN_IMAGE", "<other>")
    monkeypatch.setenv("DATA_JUICER_EXTERNAL_MODELS_HOME", "/models")
    monkeypatch.setenv("MP_START_METHOD", "spawn")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = child.environment()
    assert not {"_DJ_SPECIAL_TOKEN_IMAGE", "DATA_JUICER_EXTERNAL_MODELS_HOME", "MP_START_METHOD"} & set(found)
    wanted = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "WANDB_MODE": "disabled"}
    assert wanted.items() <= found.items()
    root = Path(found["PYTHONPATH"].split(os.pathsep)[0])
    assert (root / "mgm_exp" / "data" / "data_juicer" / "worker.py").is_file()


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (None, -9, "was ended by SIGKILL. The machine may have run out of memory."),
        (None, 2, "ended with exit code 2"),
        ({"error": "ValueError", "message": "no", "advice": ""}, 1, "Data-Juicer failed: ValueError: no"),
    ],
)
def test_a_failure_ends_with_the_last_lines_of_its_log(
    failure: dict[str, Any] | None, code: int, says: str, tmp_path: Path
) -> None:
    log = tmp_path / "data_juicer.log"
    log.write_bytes(b"of an earlier run\n" + b"line\n" * 100 + b"the cause \xff\n")
    error = child._error(failure, code, log, len(b"of an earlier run\n"))
    assert isinstance(error, MgmError) and says in str(error)
    lines = str(error).splitlines()
    assert lines[-1] == "  the cause \ufffd" and lines.count("  line") == 14 and "earlier" not in str(error)


def test_a_blocked_installation_says_which_package(tmp_path: Path) -> None:
    failure = {"error": "ImportError", "message": "run-time installation is blocked: simhash-pybind", "advice": ""}
    error = child._error(failure, 1, tmp_path / "log", 0)
    assert isinstance(error, MissingDependencyError) and "pip install simhash-pybind" in str(error)
