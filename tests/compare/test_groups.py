"""Letters of tied groups, and the quick p-values behind them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.compare import pairs as room
from mgm_exp.compare.arms import Arm
from mgm_exp.compare.groups import letter_groups, tied_groups
from mgm_exp.compare.pairs import Panel, student_p_values
from mgm_exp.compare.predictions import Questions
from mgm_exp.compare.statistics import mcnemar_exact


def panel(scores: np.ndarray, images: list[str] | None = None, seeds: int = 1) -> Panel:
    """Scores (questions, runs); each ``seeds`` columns are an arm."""
    n, runs = scores.shape
    names = tuple(str(k) for k in range(n))
    questions = Questions(names, tuple(images or names), ("t",) * n, tuple(range(n)))
    columns = tuple(tuple(range(k, k + seeds)) for k in range(0, runs, seeds))
    arms = tuple(Arm(f"arm{k}", f"arm{k}", ()) for k in range(len(columns)))
    return Panel("demo", questions, arms, columns, scores)


APART = st.integers(2, 8).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.sampled_from(list(itertools.combinations(range(n), 2)))))
)


@settings(max_examples=150, deadline=None)
@given(APART)
def test_arms_share_a_letter_exactly_where_they_are_not_told_apart(case):
    n, apart = case
    groups = letter_groups(n, apart)
    assert groups is not None
    for pair in itertools.combinations(range(n), 2):
        assert any(set(pair) <= group for group in groups) == (pair not in apart)
    assert all(any(k in group for group in groups) for k in range(n))
    assert not any(a < b for a in groups for b in groups), "a group within another says nothing"


def test_clear_levels_are_groups_with_letters_from_the_best_on():
    generator = np.random.default_rng(0)
    base = (generator.random(400) < 0.4).astype(float)
    better = np.maximum(base, generator.random(400) < 0.3)
    found = tied_groups([panel(np.column_stack([base, better, base, better]))], [], alpha=0.05, resamples=500, seed=0)[
        "demo"
    ]
    assert found["letters"] == {"arm0": "b", "arm1": "a", "arm2": "b", "arm3": "a"}
    assert found["best"] == ["arm1", "arm3"] and found["comparisons"] == 6


def test_one_arm_has_no_group():
    assert tied_groups([panel(np.ones((5, 1)))], [], alpha=0.05, resamples=10, seed=0) == {}


def test_more_groups_than_letters_can_name_are_not_lettered():
    n = 30
    apart = {(a, b) for a, b in itertools.combinations(range(n), 2) if (a + b) % 3 == 0 or (a * b) % 7 == 1}
    groups = letter_groups(n, apart)
    assert groups is None or len(groups) <= 200


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seeds", [1, 2])
def test_covariances_give_what_differences_give(monkeypatch, shared, seeds):
    generator = np.random.default_rng(1)
    scores = generator.choice([0.0, 0.3, 0.6, 0.9, 1.0], (120, 8))
    if seeds == 1:
        scores[:, 1] = scores[:, 0]
    images = [str(k // 3) for k in range(120)] if shared else None
    given = panel(scores, images, seeds)
    pairs = list(itertools.combinations(range(8 // seeds), 2))
    slow, _ = room._errors_of_pairs(given, pairs)
    monkeypatch.setattr(room, "_BLOCK", 2)
    fast, _ = room._errors_of_pairs(given, pairs)
    assert fast == pytest.approx(slow, abs=1e-7)
    monkeypatch.undo()
    p = student_p_values(given, pairs)
    assert ((p >= 0) & (p <= 1)).all() and (seeds == 2 or p[0] == 1.0)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 25), st.integers(0, 25))
def test_few_disagreements_never_look_much_surer_than_exactly(up, down):
    """Quick p-values stand in for exact ones: where those say 5 %, these must not say 3 %."""
    n = 400
    a = np.zeros(n)
    b = np.zeros(n)
    b[:up] = 1.0
    a[up : up + down] = 1.0
    (quick,) = student_p_values(panel(np.column_stack([a, b])), [(0, 1)])
    exact = mcnemar_exact(down, up)
    if exact > 0.05:
        assert quick > 0.03


def test_of_very_many_arms_each_is_tested_with_the_highest_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    made = panel(np.stack([generator.random(60) < 0.3 + 0.1 * arm for arm in range(6)], axis=1).astype(float))
    every = tied_groups([made], [], alpha=0.05, resamples=200, seed=0)["demo"]
    monkeypatch.setattr("mgm_exp.compare.groups.MOST_ARMS", 5)
    few = tied_groups([made], [], alpha=0.05, resamples=200, seed=0)["demo"]
    assert (every["comparisons"], few["comparisons"]) == (15, 5)
    assert few["letters"] == {} and few["best"][0] == every["best"][0]
    assert set(few["best"]) <= set(every["best"])  # fewer comparisons tell more apart
