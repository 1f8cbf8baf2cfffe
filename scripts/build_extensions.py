"""Builds the C++ extension that DeepSpeed loads for CPU processes, once, before many processes want it together.

DeepSpeed compiles it on first use. A process that is killed meanwhile leaves a lock file that makes every later one
wait without end; building it here, in a folder of its own (``TORCH_EXTENSIONS_DIR``), keeps that out of tests and runs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from pathlib import Path


def main() -> int:
    """Builds and loads the extension. Returns the exit code."""
    place = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not place:
        print("TORCH_EXTENSIONS_DIR is not set: it names the folder that the extension is built in.", file=sys.stderr)
        return 2
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print(
            "No C++ compiler was found, and DeepSpeed compiles an extension for CPU processes (zero=2 or zero=3 "
            "without a GPU). Install one (Debian, Ubuntu: apt-get install g++).",
            file=sys.stderr,
        )
        return 2
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    # ninja comes with DeepSpeed as a Python package, beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["DS_ACCELERATOR"] = "cpu"
    started = time.monotonic()
    with (folder / ".building").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        # Nobody else builds here while the lock is held: what is left of a killed build can go.
        for stale in folder.glob("*/lock"):
            stale.unlink()
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    print(f"DeepSpeed's shared-memory extension is ready in {folder} ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
