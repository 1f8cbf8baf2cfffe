"""Every failure gets a cause and an advice; unknown ones are called unknown."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mgm_exp.errors import ConfigError, DiskFullError, Interrupted, TrainingFailed
from mgm_exp.record import explain
from mgm_exp.record.failure import FAULTS, MESSAGE_LIMIT


def os_error(number: int, path: str = "/data/x") -> OSError:
    return OSError(number, os.strerror(number), path)


class OutOfMemoryError(RuntimeError):
    """Of torch's name; torch itself is not needed to recognise it."""


@pytest.mark.parametrize(
    ("error", "cause", "advice"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU's memory", "micro_batch_size"),
        (RuntimeError("CUDA error: out of memory"), "GPU's memory", "micro_batch_size"),
        (MemoryError(), "machine's memory", "micro_batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "machine's memory", "workers"),
        (os_error(errno.ENOSPC), "disk is full", "mgm-exp gc"),
        (os_error(errno.EROFS), "cannot be written", "paths.root"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "cannot be written", "paths.root"),
        (os_error(errno.EMFILE), "too many files", "ulimit"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/data/a.json"), "missing", "path"),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."), "killed", "memory"),
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), "data-loading worker", "train.workers=0"),
        (RuntimeError("Found no NVIDIA driver on your system"), "driver", "device=cpu"),
        (RuntimeError("CUDA error: device-side assert triggered"), "kernel", "CUDA_LAUNCH_BLOCKING"),
        (RuntimeError("[1] is setting up NCCL communicator: NCCL error"), "lost each other", "NCCL_DEBUG"),
        (FloatingPointError("overflow"), "diverged", "train.lr"),
        (ModuleNotFoundError("No module named 'deepspeed'"), "not installed", "pip install"),
        (RuntimeError("Error building extension 'deepspeed_shm_comm'"), "C++ extension", "g++"),
        (RuntimeError("Error(s) in loading state_dict for MGM: size mismatch for x"), "do not fit", "model.path"),
        (KeyboardInterrupt(), "Ctrl-C", "continues"),
    ],
)
def test_known_failures_are_recognised(error: BaseException, cause: str, advice: str) -> None:
    found = explain(error)
    assert set(found) == {"type", "message", "cause", "advice"}
    assert found["type"] == type(error).__name__
    assert cause in found["cause"]
    assert advice in found["advice"]


def test_an_unknown_failure_is_called_unknown_and_says_where() -> None:
    try:
        raise ValueError("seven is not a colour")
    except ValueError as error:
        found = explain(error)
    assert found["message"] == "seven is not a colour"
    assert found["cause"].startswith("unknown: ValueError in test_failure.py, line ")
    assert "HYDRA_FULL_ERROR=1" in found["advice"]


def test_what_an_error_was_raised_from_tells_its_cause() -> None:
    try:
        try:
            raise os_error(errno.ENOSPC)
        except OSError as inner:
            raise RuntimeError("the checkpoint could not be saved") from inner
    except RuntimeError as error:
        assert explain(error)["cause"] == "the disk is full"


def test_a_cause_that_was_hidden_on_purpose_stays_hidden() -> None:
    try:
        try:
            raise os_error(errno.ENOSPC)
        except OSError:
            raise ValueError("something else") from None
    except ValueError as error:
        assert explain(error)["cause"].startswith("unknown")


def test_errors_of_this_package_keep_their_own_words() -> None:
    found = explain(ConfigError("train.lr=-1 must be above 0.", advice="Give a positive rate."))
    assert found == {
        "type": "ConfigError",
        "message": "train.lr=-1 must be above 0.",
        "cause": "the configuration",
        "advice": "Give a positive rate.",
    }
    assert explain(DiskFullError("No space."))["cause"] == "the disk is full"
    assert "continues" in explain(Interrupted("Stopped by SIGTERM."))["advice"]


def test_a_failed_worker_is_explained_by_its_exit_code_or_words() -> None:
    killed = explain(TrainingFailed("Worker 1 ended with exitcode: -9."))
    assert "killed from outside" in killed["cause"]
    diverged = explain(TrainingFailed("The loss is nan at step 12.", advice="Lower train.lr."))
    assert "diverged" in diverged["cause"]
    assert diverged["advice"] == "Lower train.lr."


def test_an_error_without_words_has_a_message_all_the_same() -> None:
    assert explain(MemoryError())["message"] == "MemoryError"


def test_secrets_and_pages_of_text_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-77aa")
    found = explain(RuntimeError("401 for canary-77aa " + "x" * 10 * MESSAGE_LIMIT))
    assert "canary" not in str(found)
    assert len(found["message"]) <= MESSAGE_LIMIT


def test_real_errors_of_torch_and_safetensors_are_recognised(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    with pytest.raises(RuntimeError) as mismatch:
        torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)})
    assert "do not fit" in explain(mismatch.value)["cause"]
    with pytest.raises(RuntimeError) as memory:
        torch.empty(2**60, dtype=torch.uint8)
    assert "machine's memory" in explain(memory.value)["cause"]
    broken = tmp_path / "x.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    with pytest.raises(Exception) as damaged, safe_open(broken, "pt"):
        pass
    assert "damaged" in explain(damaged.value)["cause"]


def test_every_advice_says_what_to_do() -> None:
    for fault in FAULTS:
        assert fault.types or fault.numbers or fault.words, fault
        assert fault.advice.endswith("."), fault
        assert not fault.cause.endswith("."), fault
