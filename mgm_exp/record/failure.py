"""From an exception to what ``result.json`` says about it: type, message, cause, advice.

Errors of this package carry their own message and advice. Of foreign errors the well-known ones are recognised by type,
errno and wording; an unknown one is called unknown.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    Interrupted,
    LeaseLost,
    MgmError,
    MissingDependencyError,
    ModelError,
    Paused,
    Pruned,
    TrainingFailed,
)
from mgm_exp.record.secrets import redact_text

# A message of a page (a worker's traceback, a list of tensors) is cut in result.json; log.txt has all of it.
MESSAGE_LIMIT = 2000


@dataclass(frozen=True)
class Fault:
    """A kind of failure, how to recognise it, and what to do about it."""

    cause: str
    advice: str
    # Names of exception classes, anywhere in the class's ancestry.
    types: tuple[str, ...] = ()
    # Numbers of an OSError.
    numbers: tuple[int, ...] = ()
    # Found in "TypeName: message", case-insensitive.
    words: str = ""

    def fits(self, error: BaseException) -> bool:
        """Whether ``error`` itself (not what caused it) is of this kind."""
        if any(kind.__name__ in self.types for kind in type(error).__mro__):
            return True
        if isinstance(error, OSError) and error.errno in self.numbers:
            return True
        return bool(self.words) and re.search(self.words, f"{type(error).__name__}: {error}", re.I | re.S) is not None


GPU_MEMORY = "the GPU's memory is full"
MACHINE_MEMORY = "the machine's memory is full"
# Causes that a smaller trial would not have: a search learns from them.
OUT_OF_MEMORY = (GPU_MEMORY, MACHINE_MEMORY)
CONTINUES = "the same command continues from the last checkpoint"

# The first that fits an error of the chain is taken, innermost error first: what is specific stands before what is
# general.
FAULTS = (
    Fault(
        GPU_MEMORY,
        "Lower train.micro_batch_size (the global batch stays as it is), or take model.gradient_checkpointing=true, "
        f"zero=2 or zero=3, a smaller train.max_length; then {CONTINUES}.",
        types=("OutOfMemoryError",),
        words=r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory",
    ),
    Fault(
        MACHINE_MEMORY,
        "Lower train.micro_batch_size, train.workers or data.max_megapixels, use fewer devices, or take a machine with "
        f"more memory; then {CONTINUES}.",
        types=("MemoryError",),
        numbers=(errno.ENOMEM,),
        words=r"DefaultCPUAllocator: can't allocate|cannot allocate memory|std::bad_alloc",
    ),
    Fault(
        "shared memory (/dev/shm) is full",
        "Lower train.workers (0 needs none), or give the container more shared memory (docker: --shm-size=8g).",
        words=r"bus error|insufficient shared memory|unable to (?:open|write|allocate) .*shared memory|/dev/shm",
    ),
    Fault(
        "the disk is full",
        "Free some space (`mgm-exp gc` drops unused store entries), or put paths.root on a larger disk; files that "
        f"were complete are still complete and {CONTINUES}.",
        numbers=(errno.ENOSPC, errno.EDQUOT),
        words=r"no space left on device|disk quota exceeded|database or disk is full",
    ),
    Fault(
        "the folder cannot be written",
        "Check the owner and the mount of paths.root (default: outputs), or give another one: paths.root=/some/folder.",
        numbers=(errno.EACCES, errno.EPERM, errno.EROFS),
    ),
    Fault(
        "too many files are open",
        "Raise the limit (ulimit -n 65536) or lower train.workers.",
        numbers=(errno.EMFILE, errno.ENFILE),
    ),
    Fault(
        "a process of the run was killed from outside (signal 9); most often the machine ran out of memory",
        "Look for 'Out of memory' in the kernel's log (dmesg) or in the job's record; lower train.micro_batch_size, "
        f"train.workers or devices. {CONTINUES.capitalize()}.",
        words=r"exitcode\W{1,3}-9\b|signal 9\b|SIGKILL|killed by signal: killed|terminated with signal 9",
    ),
    Fault(
        "a data-loading worker died",
        "Most often memory or a damaged file: run with train.workers=0 to see its own error.",
        words=r"DataLoader worker .*(?:exited|killed)",
    ),
    Fault(
        "the training diverged: a loss or a gradient is not finite",
        "Lower train.lr (and train.projector_lr), raise train.warmup_ratio, keep train.max_grad_norm at 1, or take "
        f"train.precision=bf16 or fp32 in place of fp16; {CONTINUES} with the old values only.",
        types=("FloatingPointError",),
        words=r"(?:loss|gradient|grad_norm|logits)\b.{0,60}\b(?:nan|inf|not finite|non-finite)\b",
    ),
    Fault(
        "the GPU driver is not there or too old",
        "Check nvidia-smi and the installed torch build (python -c 'import torch; print(torch.version.cuda)'), or run "
        "on the CPU: device=cpu.",
        words=r"no NVIDIA driver|driver on your system is too old|Torch not compiled with CUDA|no CUDA GPUs",
    ),
    Fault(
        "a GPU kernel failed",
        "Run once with CUDA_LAUNCH_BLOCKING=1 to see which operation; an index out of range is a wrong token id, an "
        "ECC or Xid error in dmesg is the hardware.",
        words=r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|device-side assert",
    ),
    Fault(
        "the processes of the run lost each other",
        "One of them died or hangs: the first error in log.txt is the cause. On several machines check the network "
        "interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and run with NCCL_DEBUG=INFO.",
        types=("DistNetworkError", "DistBackendError", "DistStoreError"),
        words=r"NCCL error|ncclSystemError|connectFullMesh|Connection (?:closed|reset) by peer|"
        r"gloo.*timed? ?out|EADDRINUSE|address already in use|watchdog .*timeout",
    ),
    Fault(
        "a C++ extension of DeepSpeed could not be built",
        "Install g++ and ninja, and remove a half-built folder below TORCH_EXTENSIONS_DIR (default "
        "~/.cache/torch_extensions); zero=none needs no extension.",
        words=r"error building extension|ninja is required|unable to JIT load",
    ),
    Fault(
        "a package is not installed",
        "Install it, or the extra that brings it: pip install 'mgm-exp[cuda]', 'mgm-exp[data]' or 'mgm-exp[slurm]'.",
        types=("ModuleNotFoundError",),
    ),
    Fault(
        "something had to be downloaded and cannot be",
        "Give local folders (model.path, model.vision_tower, data.path, data.captioner.path): nothing is downloaded "
        "while a run is going on.",
        types=("OfflineModeIsEnabled", "LocalEntryNotFoundError"),
        words=r"couldn't connect to .* to load|offline mode is enabled|Name or service not known|name resolution",
    ),
    Fault(
        "a weights file is damaged or incomplete",
        "Copy it again and compare its size and SHA-256 with the source's.",
        types=("SafetensorError",),
        words=r"Error while deserializing header|PytorchStreamReader failed",
    ),
    Fault(
        "the weights do not fit the model",
        "The checkpoint is of another architecture or another size than model=... says: check model.path, and with an "
        "adapter its base model.",
        words=r"Error\(s\) in loading state_dict|size mismatch for ",
    ),
    Fault(
        "a file or a folder is missing",
        "Check the path in the message; relative paths are relative to the folder the command was given in.",
        types=("FileNotFoundError", "NotADirectoryError"),
    ),
    Fault(
        "a file is not what its name says (text that cannot be decoded)",
        "Check the file in the message; JSON and JSONL must be UTF-8.",
        types=("UnicodeDecodeError", "JSONDecodeError"),
    ),
    Fault(
        "a process of the run failed",
        "The first traceback in log.txt is the cause; the others were stopped because of it. "
        f"{CONTINUES.capitalize()}.",
        types=("ChildFailedError", "ProcessRaisedException", "ProcessExitedException"),
    ),
)

_OWN_CAUSES: tuple[tuple[type[MgmError], str, str], ...] = (
    (Pruned, "a search stopped the run at a validation point", "Nothing is wrong: other trials do better."),
    (Paused, "the run has come to its rung", "Nothing is wrong: it goes on from there if it is among the best."),
    (Interrupted, "a signal or Ctrl-C asked the run to stop", f"{CONTINUES.capitalize()}."),
    (ConfigError, "the configuration", "Change the named keys; `python -m mgm_exp --help` shows what is allowed."),
    (DataError, "the data", "Mend or leave out the named rows, or see data.bad_rows and data.max_bad_share."),
    (ModelError, "the checkpoint", "Check model.path and the towers' paths."),
    (MissingDependencyError, "a package or a device is not there", "Install it, or choose what works without it."),
    (DiskFullError, "the disk is full", f"Free some space; {CONTINUES}."),
    (
        LeaseLost,
        "another process took this folder over",
        "Wait for it, or stop it: two processes cannot write one run folder.",
    ),
    (TrainingFailed, "training cannot go on", f"See the last rows of metrics.jsonl and log.txt; {CONTINUES}."),
)


def explain(error: BaseException) -> dict[str, str]:
    """What happened, why, and what to do: the ``error`` of ``result.json``.

    Args:
        error: What ended the run; what it was raised from is looked at too.

    Returns:
        ``type`` (class name), ``message`` (without secrets, at most ``MESSAGE_LIMIT`` characters), ``cause`` and
        ``advice``.
    """
    message = error.message if isinstance(error, MgmError) else str(error)
    cause, advice = _own(error) if isinstance(error, MgmError) else _foreign(error)
    return {
        "type": type(error).__name__,
        "message": _short(redact_text(message)) or type(error).__name__,
        "cause": redact_text(cause),
        "advice": redact_text(advice),
    }


def _own(error: MgmError) -> tuple[str, str]:
    cause, advice = next(
        ((cause, advice) for kind, cause, advice in _OWN_CAUSES if isinstance(error, kind)),
        ("see the message", "See the message and log.txt."),
    )
    # What it was raised from says more than the class does; a bare "raise ... from None" has nothing behind it.
    inner = [link for link in _chain(error) if link is not error]
    for link in inner:
        for fault in FAULTS:
            if fault.fits(link):
                return fault.cause, error.advice or fault.advice
    if inner:
        cause = f"{cause}: {type(inner[0]).__name__}: {_short(str(inner[0]), 300)}"
    elif isinstance(error, TrainingFailed):
        fault_of_words = next((fault for fault in FAULTS if fault.words and fault.fits(error)), None)
        if fault_of_words is not None:
            return fault_of_words.cause, error.advice or fault_of_words.advice
    return cause, error.advice or advice


def _foreign(error: BaseException) -> tuple[str, str]:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "a signal or Ctrl-C asked the run to stop", f"{CONTINUES.capitalize()}."
    for link in _chain(error):
        for fault in FAULTS:
            if fault.fits(link):
                return fault.cause, fault.advice
    return (
        f"unknown: {_short(_place(error), 300)}",
        "This is not a failure that is known here, and may be a fault of this program. log.txt ends with what was "
        "printed; give the command again with HYDRA_FULL_ERROR=1 to see the traceback, and report it with both.",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """What ``error`` was raised from, innermost first, and ``error`` itself last."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    yield from reversed(chain)


def _place(error: BaseException) -> str:
    """Where an error was raised, as file name, line and function."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    last = frames[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}, {last.name}()"


def _short(text: str, limit: int = MESSAGE_LIMIT) -> str:
    text = text.strip()
    rest = " ... (see log.txt)"
    return text if len(text) <= limit else text[: limit - len(rest)] + rest
