"""Memory of the C library on a CPU: what one batch gives back, the next one gets, without asking the kernel."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES = 256 * 1024**2
_LARGE_BYTES = 32 * 1024**2


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Lets this process keep up to 256 MB that it has freed, in blocks of up to 32 MB; whether that is in force.

    By default glibc gives a tensor of some MB back to the kernel as soon as it is freed, and every page of the next one
    is zeroed anew: a tenth of the time of a small model's batches. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE_BYTES) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
