"""Guards: what the numbers of a step say about a run, and what its policy makes of that. Decisions only, no tensors.

    guards = Guards(config.train.guards, state)          # state: a plain dict that lies in the checkpoint
    trouble = guards.note(step, loss, grad_norm, event=None)
    if trouble: ...                                       # the loop names the batch and does trouble.action

Losses and gradient norms are compared on a log scale with the median of the last ``window`` steps, in robust standard
deviations (1.4826 x the median absolute deviation; Rousseeuw & Croux 1993): a spike does not hide the next one, and a
level that stays becomes the new normal. A decision is a function of the numbers so far, which are the same on every
process and after a resume, and so is what follows from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from mgm_exp.config import GuardAction, GuardsConfig

# This many steps are seen before anything is compared.
FEWEST = 16
# The least standard deviation that is believed, on the log scale: 5 %.
LEAST_SIGMA = 0.05
# The loss that a plateau or a divergence is judged by is the median of so many steps.
SMOOTHED = 8
# A loss is above its best only if it is so much above (nats per token): losses near zero have large ratios.
LEAST_RISE = 0.5
# Steps in a row without an update, whatever the policy, that end the stage.
MOST_SKIPPED_IN_A_ROW = 3
# After a lowered rate so many steps pass before the next action: the weights need them to recover.
RECOVERY = 16
# Events of one kind that are written out; later ones are counted only.
MOST_TOLD = 100
_SIGMA_OF_MAD = 1.4826
_TINY = 1e-30


@dataclass(frozen=True)
class Trouble:
    """What a guard found at a step.

    Args:
        reason: ``not_finite``, ``spike``, ``divergence`` or ``plateau``.
        action: What the policy says.
        detail: In words, with the numbers.
        onset: Steps that were done before it began: a checkpoint of that many steps or fewer is good.
        is_exhausted: The policy's action was taken too often already: the stage ends.
    """

    reason: str
    action: GuardAction
    detail: str
    onset: int
    is_exhausted: bool = False


@dataclass(frozen=True)
class Limits:
    """Largest loss and gradient norm with which a step is applied."""

    loss: float = math.inf
    grad_norm: float = math.inf


class Guards:
    """Watches one stage.

    Args:
        config: ``train.guards``.
        state: What :attr:`state` was at the checkpoint; an empty dict at the beginning. It is changed in place and
            stays plain data.
    """

    def __init__(self, config: GuardsConfig, state: dict[str, Any]) -> None:
        self.config, self.state = config, state
        for key, value in (
            ("losses", []),  # log of the last finite ones
            ("norms", []),
            ("spikes_in_a_row", 0),
            ("skipped_in_a_row", 0),
            ("above_in_a_row", 0),
            ("best", None),  # lowest smoothed loss
            ("best_step", 0),
            ("rested_at", 0),  # no action before this step
            ("lr_factor", 1.0),
            ("batches_skipped", 0),  # the data is so many batches ahead of the step
            ("rollbacks", 0),
            ("actions", 0),
            ("counts", {}),  # reason -> how often
        ):
            state.setdefault(key, value)

    @property
    def changes_later_steps(self) -> bool:
        """Whether a step must have been judged before the next one may begin."""
        config = self.config
        policies = (config.on_nonfinite, config.on_spike, config.on_divergence)
        return config.on_spike is GuardAction.skip or GuardAction.lower_lr in policies

    @property
    def may_roll_back(self) -> bool:
        config = self.config
        return GuardAction.rollback in (config.on_nonfinite, config.on_spike, config.on_divergence)

    @property
    def lr_factor(self) -> float:
        """What the schedule is multiplied by."""
        return float(self.state["lr_factor"])

    @property
    def batches_skipped(self) -> int:
        """How many batches the data is ahead of the step."""
        return int(self.state["batches_skipped"])

    def limits(self) -> Limits | None:
        """Up to where the next step is applied; None: everything that is finite, but for ``on_spike=skip``."""
        state, config = self.state, self.config
        if config.on_spike is not GuardAction.skip or state["spikes_in_a_row"] + 1 < config.patience:
            return None
        return Limits(*(_limit(state[key], config.threshold) for key in ("losses", "norms")))

    def note(self, step: int, loss: float, grad_norm: float, event: str | None) -> Trouble | None:
        """Takes the numbers of one step in.

        Args:
            step: How many steps are done with it.
            event: Why it was not applied: ``not_finite``, or ``spike`` because of :meth:`limits`; None: it was.

        Returns:
            What is to be done about it; None: nothing.
        """
        state = self.state
        if event == "not_finite":
            return self._not_finite(step, loss, grad_norm)
        spike, skipped = self._spike(loss, grad_norm), event == "spike"
        for key, value in (("losses", loss), ("norms", grad_norm)):
            state[key] = [*state[key], _log(value)][-self.config.window :]
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if skipped else 0
        # All are kept up to date, whatever else is found; of several the first one that is more than a remark counts
        found = (self._spiked(step, spike, skipped), self._diverged(step, loss), self._stands_still(step))
        troubles = [trouble for trouble in found if trouble is not None]
        acting = [trouble for trouble in troubles if trouble.action is not GuardAction.warn or trouble.is_exhausted]
        return next(iter(acting or reversed(troubles)), None)

    def count(self, reason: str) -> bool:
        """Counts an event; whether it is still to be told."""
        counts = self.state["counts"]
        counts[reason] = counts.get(reason, 0) + 1
        return bool(counts[reason] <= MOST_TOLD)

    def lower_lr(self, step: int) -> None:
        """From the next step on the schedule is multiplied by ``lr_factor`` once more."""
        self.state["lr_factor"] *= self.config.lr_factor
        self.state["rested_at"] = step + RECOVERY

    def record(self) -> dict[str, Any]:
        """For ``summary.json``: what was found and done, how often."""
        state = self.state
        return {
            "found": dict(state["counts"]),
            "actions": state["actions"],
            "rollbacks": state["rollbacks"],
            "batches_skipped": state["batches_skipped"],
            "lr_factor": state["lr_factor"],
        }

    # -- one guard each ----------------------------------------------------------------------------------------

    def _not_finite(self, step: int, loss: float, grad_norm: float) -> Trouble:
        self.state["skipped_in_a_row"] += 1
        in_a_row = self.state["skipped_in_a_row"]
        detail = f"not finite (loss {loss}, gradient norm {grad_norm})"
        if in_a_row >= MOST_SKIPPED_IN_A_ROW:
            detail = f"not finite in {in_a_row} steps in a row (loss {loss}, gradient norm {grad_norm})"
            return Trouble("not_finite", self.config.on_nonfinite, detail, step - in_a_row, is_exhausted=True)
        return self._act("not_finite", self.config.on_nonfinite, detail, step - in_a_row, step)

    def _spike(self, loss: float, grad_norm: float) -> str:
        """What is too large, in words; empty if nothing is."""
        found = []
        for name, key, value in (("loss", "losses", loss), ("gradient norm", "norms", grad_norm)):
            history = self.state[key]
            score = robust_score(history, _log(value))
            if score > self.config.threshold:
                usual = math.exp(median(history))
                found.append(f"{name} {value:.4g}, usually {usual:.4g} ({score:.1f} robust standard deviations)")
        return "; ".join(found)

    def _spiked(self, step: int, spike: str, skipped: bool) -> Trouble | None:
        state, config = self.state, self.config
        state["spikes_in_a_row"] = state["spikes_in_a_row"] + 1 if spike or skipped else 0
        in_a_row = state["spikes_in_a_row"]
        if not spike and not skipped:
            return None
        action = config.on_spike if in_a_row >= config.patience else GuardAction.warn
        if action is GuardAction.skip and not skipped:
            action = GuardAction.warn  # patience was not used up when it began
        onset = step - in_a_row
        if state["skipped_in_a_row"] >= MOST_SKIPPED_IN_A_ROW:
            spike += f"; {state['skipped_in_a_row']} steps in a row changed nothing"
            return Trouble("spike", action, spike, onset, is_exhausted=True)
        return self._act("spike", action, spike, onset, step)

    def _smoothed(self) -> float | None:
        losses = self.state["losses"]
        return math.exp(median(losses[-SMOOTHED:])) if len(losses) >= SMOOTHED else None

    def _diverged(self, step: int, loss: float) -> Trouble | None:
        state, config = self.state, self.config
        smoothed = self._smoothed()
        if smoothed is None:
            return None
        best = state["best"]
        if best is None or smoothed < best:
            if best is None or smoothed < best - config.plateau_min_delta:
                state["best_step"] = step
            state["best"] = best = smoothed
        is_above = loss > max(best * config.divergence_factor, best + LEAST_RISE)
        state["above_in_a_row"] = state["above_in_a_row"] + 1 if is_above else 0
        if state["above_in_a_row"] < config.divergence_patience:
            return None
        in_a_row, state["above_in_a_row"] = state["above_in_a_row"], 0
        detail = f"loss {loss:.4g} after {in_a_row} steps in a row far above its best ({best:.4g})"
        return self._act("divergence", config.on_divergence, detail, step - in_a_row, step)

    def _stands_still(self, step: int) -> Trouble | None:
        state, patience = self.state, self.config.plateau_patience
        if patience is None or state["best"] is None or step - state["best_step"] < patience:
            return None
        state["best_step"] = step
        detail = f"loss not below {state['best']:.4g} by {self.config.plateau_min_delta:g} for {patience} steps"
        return Trouble("plateau", GuardAction.warn, detail, step)

    def _act(self, reason: str, action: GuardAction, detail: str, onset: int, step: int) -> Trouble:
        """The policy's action, unless the weights still recover from the last one or it was taken too often."""
        if action in (GuardAction.warn, GuardAction.stop):
            return Trouble(reason, action, detail, onset)
        if step < self.state["rested_at"] and action is GuardAction.lower_lr:
            return Trouble(reason, GuardAction.warn, detail, onset)
        self.state["actions"] += 1
        is_exhausted = self.state["actions"] > self.config.max_actions
        return Trouble(reason, action, detail, onset, is_exhausted=is_exhausted)


def robust_score(history: list[float], value: float) -> float:
    """How far ``value`` lies above the median of ``history``, in robust standard deviations; 0 with too little of it.

    Args:
        history: Logarithms.
        value: A logarithm.
    """
    if len(history) < FEWEST:
        return 0.0
    middle, sigma = _spread(history)
    return (value - middle) / sigma


def _limit(history: list[float], threshold: float) -> float:
    """The value whose :func:`robust_score` is the threshold."""
    if len(history) < FEWEST:
        return math.inf
    middle, sigma = _spread(history)
    exponent = middle + threshold * sigma
    return math.exp(exponent) if exponent < 700 else math.inf


def _spread(history: list[float]) -> tuple[float, float]:
    middle = median(history)
    return middle, max(LEAST_SIGMA, _SIGMA_OF_MAD * median(abs(value - middle) for value in history))


def _log(value: float) -> float:
    return math.log(max(value, _TINY))
