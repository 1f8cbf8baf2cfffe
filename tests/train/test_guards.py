"""Guards decide by numbers alone: what is a spike, what is a level, and when enough is enough."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest

from mgm_exp.config import GuardAction, GuardsConfig
from mgm_exp.train.guards import FEWEST, MOST_SKIPPED_IN_A_ROW, RECOVERY, Guards, Trouble, robust_score


def guards_of(**settings: Any) -> Guards:
    return Guards(GuardsConfig(**settings), {})


def feed(guards: Guards, losses: list[float], *, start: int = 1, norm: float = 1.0) -> list[tuple[int, Trouble]]:
    found = [(start + i, guards.note(start + i, loss, norm, None)) for i, loss in enumerate(losses)]
    return [(step, trouble) for step, trouble in found if trouble is not None]


def noisy(n: int, level: float = 2.0, seed: int = 0, spread: float = 0.1) -> list[float]:
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0, spread)) for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_spike_and_a_falling_loss_neither(seed: int) -> None:
    falling = [loss * (0.1 + math.exp(-i / 60)) for i, loss in enumerate(noisy(600, 3.0, seed))]
    assert feed(guards_of(), falling) == []


def test_a_spike_is_found_at_its_step_and_does_not_hide_the_next() -> None:
    losses = noisy(100)
    losses[60], losses[63] = 40.0, 400.0
    found = feed(guards_of(), losses)
    assert [(step, trouble.reason, trouble.onset) for step, trouble in found] == [(61, "spike", 60), (64, "spike", 63)]
    assert found[0][1].detail.startswith("loss 40, usually 1.9")
    assert found[0][1].action is GuardAction.warn


def test_a_gradient_norm_alone_is_enough() -> None:
    guards = guards_of()
    feed(guards, noisy(40))
    trouble = guards.note(41, 2.0, 1e4, None)
    assert trouble is not None
    assert trouble.detail.startswith("gradient norm 1e+04")


def test_a_new_level_becomes_the_normal_one() -> None:
    found = feed(guards_of(window=32, divergence_patience=500), [*noisy(64), *noisy(64, 30.0, 1)])
    steps = [step for step, _ in found]
    assert steps[0] == 65
    assert steps[-1] < 65 + 20, "half a window later it is no spike any more"


def test_the_policy_acts_when_patience_is_used_up_and_from_where_it_began() -> None:
    guards = guards_of(on_spike=GuardAction.rollback, patience=3)
    feed(guards, noisy(40))
    found = feed(guards, [50.0, 60.0, 55.0], start=41)
    assert [trouble.action for _, trouble in found] == [GuardAction.warn, GuardAction.warn, GuardAction.rollback]
    assert found[-1][1].onset == 40


def test_too_few_steps_say_nothing() -> None:
    assert robust_score([0.0] * (FEWEST - 1), 9.0) == 0.0
    assert robust_score([0.0] * FEWEST, 9.0) > 8
    assert feed(guards_of(), [*noisy(FEWEST - 1), 1e6]) == []


def test_limits_are_where_a_spike_begins_and_only_for_skip() -> None:
    assert guards_of().limits() is None
    guards = guards_of(on_spike=GuardAction.skip)
    first = guards.limits()
    assert first is not None
    assert first.loss == math.inf
    losses = noisy(64)
    feed(guards, losses)
    limits = guards.limits()
    assert limits is not None
    assert feed(guards_of(), [*losses, limits.loss * 0.99]) == []
    assert len(feed(guards_of(), [*losses, limits.loss * 1.01])) == 1


def test_skipped_spikes_are_bounded_in_a_row_and_in_all() -> None:
    guards = guards_of(on_spike=GuardAction.skip, max_actions=4)
    feed(guards, noisy(40))
    found = [guards.note(41 + i, 99.0, 1.0, "spike") for i in range(MOST_SKIPPED_IN_A_ROW)]
    assert [trouble.is_exhausted for trouble in found if trouble] == [False, False, True]
    feed(guards, noisy(40), start=50)
    over = []
    for step in (100, 110, 120):
        trouble = guards.note(step, 99.0, 1.0, "spike")
        feed(guards, noisy(5), start=step + 1)
        assert trouble is not None
        over.append(trouble.is_exhausted)
    assert over == [False, False, True], "two of the first three were within the bound"


def test_three_steps_that_are_not_finite_end_it_one_does_not() -> None:
    guards = guards_of()
    found = [guards.note(step, math.nan, math.nan, "not_finite") for step in (1, 2, 3)]
    assert [trouble.is_exhausted for trouble in found if trouble] == [False, False, True]
    assert "3 steps in a row" in found[2].detail  # type: ignore[union-attr]
    other = guards_of()
    for step in range(1, 20):
        bad = step % 3 == 0
        trouble = other.note(step, math.inf if bad else 2.0, 1.0, "not_finite" if bad else None)
        assert (trouble is not None) == bad
        assert trouble is None or not trouble.is_exhausted


def test_a_loss_far_above_its_best_for_long_has_diverged() -> None:
    guards = guards_of(on_divergence=GuardAction.stop, divergence_patience=20, on_spike=GuardAction.warn)
    found = feed(guards, [*noisy(100, 1.0), *noisy(40, 5.0, 1)])
    diverged = [(step, trouble) for step, trouble in found if trouble.reason == "divergence"]
    assert [step for step, _ in diverged] == [120, 140]
    assert diverged[0][1].onset == 100
    assert diverged[0][1].action is GuardAction.stop
    near_zero = guards_of(divergence_patience=5)
    assert [t for _, t in feed(near_zero, [*noisy(50, 0.01), *noisy(50, 0.2, 1)]) if t.reason == "divergence"] == []


def test_a_lowered_rate_is_given_time() -> None:
    guards = guards_of(on_spike=GuardAction.lower_lr, lr_factor=0.25)
    feed(guards, noisy(40))
    first = guards.note(41, 99.0, 1.0, None)
    assert first is not None
    assert first.action is GuardAction.lower_lr
    guards.lower_lr(41)
    assert guards.lr_factor == 0.25
    again = guards.note(42, 99.0, 1.0, None)
    assert again is not None
    assert again.action is GuardAction.warn
    feed(guards, noisy(RECOVERY, seed=3), start=43)
    later = guards.note(43 + RECOVERY, 99.0, 1.0, None)
    assert later is not None
    assert later.action is GuardAction.lower_lr


def test_a_plateau_is_named_once_in_its_patience() -> None:
    found = feed(guards_of(plateau_patience=50), [1.0] * 220)
    assert {trouble.reason for _, trouble in found} == {"plateau"}
    steps = [step for step, _ in found]
    assert [b - a for a, b in itertools.pairwise(steps)] == [50] * (len(steps) - 1)
    assert len(steps) == 4


def test_the_state_goes_through_json_and_decides_the_same() -> None:
    losses = noisy(200)
    losses[120:123] = [30.0, 31.0, 90.0]
    whole = guards_of(patience=2, on_spike=GuardAction.lower_lr)
    expected = feed(whole, losses)
    first = guards_of(patience=2, on_spike=GuardAction.lower_lr)
    found = feed(first, losses[:121])
    second = Guards(first.config, json.loads(json.dumps(first.state)))
    assert found + feed(second, losses[121:], start=122) == expected
    assert second.state == whole.state


def test_what_is_told_is_bounded_and_all_of_it_counted() -> None:
    guards = guards_of()
    assert sum(guards.count("spike") for _ in range(500)) == 100
    assert guards.record()["found"] == {"spike": 500}


@pytest.mark.parametrize(
    ("settings", "changes", "rolls"),
    [
        ({}, False, False),
        ({"on_spike": GuardAction.skip}, True, False),
        ({"on_divergence": GuardAction.lower_lr}, True, False),
        ({"on_nonfinite": GuardAction.rollback}, False, True),
    ],
)
def test_which_policies_make_the_next_step_wait(settings: dict[str, Any], changes: bool, rolls: bool) -> None:
    guards = guards_of(**settings)
    assert (guards.changes_later_steps, guards.may_roll_back) == (changes, rolls)
