"""The errors a user can meet, and the exit code each one ends with.

An error of the user's making is one paragraph: what was given, what is allowed, what to do. It is printed without a
traceback (``--debug`` or ``HYDRA_FULL_ERROR=1`` shows it) and stands in ``result.json`` with its cause and advice.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 130


class MgmError(Exception):
    """Base of every error of this package.

    Args:
        message: What happened, naming the offending value and what is allowed.
        advice: What to do about it, one sentence; empty if the message says it already.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".strip()

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.advice)


def _rebuild(kind: type[MgmError], message: str, advice: str) -> MgmError:
    return kind(message, advice=advice)


class UserError(MgmError):
    """Something the user gave cannot be used: exit code 2."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(UserError):
    """A key, a value or a combination of values that the configuration does not allow."""


class DoesNotFit(ConfigError):
    """What the plan predicts is more than the card has: exit code 3."""

    exit_code = EXIT_DOES_NOT_FIT


class DataError(UserError):
    """A dataset, a row or an image that cannot be used."""


class UnusableRow(DataError):
    """A row that a model's processor cannot take; ``kind`` is one of :data:`mgm_exp.data.kinds.ROW_KINDS`."""

    kind = "unsupported_row"


class SpecialTokenInText(UnusableRow):
    """A text that holds a special token of the tokenizer: it would act instead of being read."""

    kind = "special_token"


class BoundaryNotFound(UnusableRow):
    """A conversation in which it cannot be told exactly which tokens an answer consists of."""

    kind = "no_boundary"


class ImageTruncated(UnusableRow):
    """A conversation whose image does not fit into the longest sequence."""

    kind = "image_truncated"


class ModelError(UserError):
    """A checkpoint or a model folder that cannot be used."""


class MissingDependencyError(UserError):
    """A package or a device that this configuration needs is not there."""


class DiskFullError(UserError):
    """No space is left for a file that has to be written; nothing half-written remains."""


class LeaseLost(MgmError):
    """Another process took over the folder that this one was writing: this one must stop."""


class TrainingFailed(MgmError):
    """Training stopped and cannot go on by itself (a worker died, a loss that is not finite, ...)."""


class LossNotFinite(TrainingFailed):
    """The loss or the gradient stays NaN, infinite or out of all bounds: the settings do not train (a search learns to
    avoid them)."""


class OutOfMemory(TrainingFailed):
    """The GPU's memory (or torch's share of the machine's) ended in a training step; a smaller micro-batch may fit."""


class ProcessKilled(TrainingFailed):
    """A process of the run was killed from outside: the work is not to blame, and can be continued."""


class Pruned(MgmError):
    """A search stopped this run at a validation point, because others do better: its partial result is kept."""

    exit_code = EXIT_DONE


class Paused(MgmError):
    """A run came to the step where it was to pause (``sweep.pause_after``): its state was saved."""

    exit_code = EXIT_DONE


class Interrupted(MgmError):
    """A signal asked the run to stop; its state was saved: exit code 130."""

    exit_code = EXIT_INTERRUPTED
