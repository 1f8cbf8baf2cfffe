"""Parity with statsmodels, scipy and rliable, and what the statistics must do on data of known origin."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.compare import statistics as stats

GOLDEN = json.loads((Path(__file__).parents[1] / "data/eval/statistics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["mcnemar"]["cases"], ids=lambda case: str(case["table"]))
def test_mcnemar_agrees_with_statsmodels(case):
    (_, b), (c, _) = case["table"]
    assert stats.mcnemar_exact(b, c) == pytest.approx(case["exact_p"], rel=1e-9, abs=1e-12)


def test_mcnemar_without_disagreement_is_one_and_large_counts_do_not_overflow():
    assert stats.mcnemar_exact(0, 0) == 1.0
    assert 0 < stats.mcnemar_exact(40_000, 42_000) < 1e-10


@pytest.mark.parametrize("b,c", [(-1, 2), (1.5, 2)])
def test_mcnemar_refuses_what_is_no_count(b, c):
    with pytest.raises(ValueError, match="whole numbers"):
        stats.mcnemar_exact(b, c)


@pytest.mark.parametrize("case", GOLDEN["multiple_testing"]["cases"], ids=lambda case: str(case["p"])[:30])
def test_holm_and_benjamini_hochberg_agree_with_statsmodels(case):
    assert stats.holm(case["p"]) == pytest.approx(case["holm"]["adjusted"], abs=1e-12)
    assert stats.benjamini_hochberg(case["p"]) == pytest.approx(case["fdr_bh"]["adjusted"], abs=1e-12)


def test_no_comparison_needs_no_adjustment():
    assert stats.holm([]) == [] and stats.benjamini_hochberg([]) == []


@pytest.mark.parametrize("case", GOLDEN["proportion_ci"]["cases"], ids=lambda case: f"{case['k']}of{case['n']}")
def test_wilson_interval_agrees_with_statsmodels(case):
    assert stats.wilson_interval(case["k"], case["n"]) == pytest.approx(case["wilson"], abs=1e-9)


@pytest.mark.parametrize("case", GOLDEN["paired"]["cases"], ids=lambda case: f"n{len(case['a'])}")
def test_paired_difference_agrees_with_scipy_statsmodels_and_miller(case):
    independent = stats.paired_difference(case["a"], case["b"])
    clustered = stats.paired_difference(case["a"], case["b"], clusters=case["cluster"])
    assert independent.difference == pytest.approx(case["mean_diff"], abs=1e-12)
    assert independent.standard_error == pytest.approx(case["paired_se"], abs=1e-12)
    assert clustered.standard_error == pytest.approx(case["clustered_se_miller"], abs=1e-12)
    assert clustered.n_clusters == len(set(case["cluster"]))


@pytest.mark.parametrize("case", GOLDEN["paired"]["cases"], ids=lambda case: f"n{len(case['a'])}")
def test_paired_bootstrap_reproduces_the_published_recipe_exactly(case):
    interval = stats.paired_bootstrap(case["a"], case["b"], n=2000, seed=42)
    assert interval == pytest.approx(case["pcg64_seed42_bootstrap"]["ci"], abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["paired"]["cases"], ids=lambda case: f"n{len(case['a'])}")
def test_sign_flip_permutation_agrees_with_scipy(case):
    p = stats.sign_flip_permutation(case["a"], case["b"], n=9999, seed=123)
    expected = case["permutation_samples_seed123_9999"]
    assert p == pytest.approx(expected["p"], abs=expected["tolerance_if_other_rng"])


@pytest.mark.parametrize("case", GOLDEN["power"]["cases"], ids=lambda case: str(round(case["n"])))
def test_questions_needed_agrees_with_millers_formula(case):
    n = stats.questions_needed(
        case["delta"], case["omega2"], case["sigmaA2"], case["sigmaB2"], case["K"], case["alpha"], 1 - case["beta"]
    )
    assert n == pytest.approx(case["n"], rel=1e-9)


def test_interquartile_mean_and_probability_of_improvement_agree_with_rliable():
    scores = {name: np.array(rows) for name, rows in GOLDEN["rliable"]["scores"].items()}
    for name, point in GOLDEN["rliable"]["point"].items():
        assert stats.interquartile_mean(scores[name]) == pytest.approx(point[0], abs=1e-12)
    assert stats.probability_of_improvement(scores["lora_r8"], scores["lora_r16"]) == pytest.approx(
        GOLDEN["rliable"]["prob_improvement_r16_over_r8"], abs=1e-12
    )


SCORES = st.lists(st.tuples(*[st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])] * 2), min_size=2, max_size=40)


@settings(max_examples=50, deadline=None)
@given(SCORES)
def test_swapping_the_runs_mirrors_the_difference_and_keeps_p(pairs):
    a, b = (np.array(column) for column in zip(*pairs, strict=True))
    there, back = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert there.difference == pytest.approx(-back.difference, abs=1e-12)
    assert there.standard_error == pytest.approx(back.standard_error, abs=1e-12)
    assert stats.sign_flip_permutation(a, b, 500, 0) == pytest.approx(stats.sign_flip_permutation(b, a, 500, 0))
    low, high = stats.paired_bootstrap(a, b, 500, 0)
    assert low - 1e-12 <= there.difference <= high + 1e-12 or (b - a).std() > 0


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(1, 5))
def test_one_question_a_cluster_is_the_same_as_no_clusters(pairs, seed):
    a, b = (np.array(column) for column in zip(*pairs, strict=True))
    own = [f"image{k}" for k in range(len(a))]
    assert stats.paired_bootstrap(a, b, 300, seed, clusters=own) == stats.paired_bootstrap(a, b, 300, seed)
    assert stats.sign_flip_permutation(a, b, 300, seed, clusters=own) == stats.sign_flip_permutation(a, b, 300, seed)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=20))
def test_adjusted_p_values_are_never_smaller_and_keep_their_order(p):
    adjusted, rate = stats.holm(p), stats.benjamini_hochberg(p)
    for raw, strict, mild in zip(p, adjusted, rate, strict=True):
        assert raw <= mild + 1e-12 and mild <= strict + 1e-12 and strict <= 1.0
    order = np.argsort(p, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_rate_and_stays_in_bounds(n, data):
    k = data.draw(st.integers(0, n))
    low, high = stats.wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_identical_runs_do_not_differ():
    scores = [0.0, 1.0, 0.3, 1.0]
    assert stats.sign_flip_permutation(scores, scores, 1000, 0) == 1.0
    assert stats.paired_difference(scores, scores)[:4] == (0.0, 0.0, 0.0, 0.0)
    assert stats.paired_bootstrap(scores, scores, 100, 0) == (0.0, 0.0)


def test_few_differences_are_enumerated_exactly():
    a, b = np.zeros(5), np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    assert stats.sign_flip_permutation(a, b, 10_000, 0) == 2 / 32
    assert stats.sign_flip_permutation(a, b, 10_000, 0) == stats.mcnemar_exact(0, 5)


def test_a_cluster_that_moves_as_one_is_weaker_evidence():
    a = np.zeros(40)
    b = np.r_[np.ones(12), np.zeros(28)]
    images = [0] * 12 + list(range(1, 29))
    assert stats.sign_flip_permutation(a, b, 5000, 0) < 0.01
    assert stats.sign_flip_permutation(a, b, 5000, 0, clusters=images) == 1.0
    assert stats.paired_difference(a, b, images).ci_low < 0 < stats.paired_difference(a, b).ci_low
    assert stats.design_effect(b, images) > 5


def test_many_candidates_at_once_give_the_same_numbers_as_one_at_a_time(monkeypatch):
    generator = np.random.default_rng(0)
    a = generator.integers(0, 2, 200).astype(float)
    candidates = generator.integers(0, 2, (200, 3)).astype(float)
    candidates[:, 2] = np.where(np.arange(200) < 4, 1 - a, a)  # few differences: all sign patterns are gone through
    differences = candidates - a[:, None]
    images = list(np.arange(200) // 3)
    low, high = stats.bootstrap_intervals(differences, 400, 7, images)
    p = stats.sign_flip_p_values(differences, 400, 7)
    monkeypatch.setattr(stats, "_CHUNK_ELEMENTS", 1000)  # other block sizes must not change the draws
    for column in range(3):
        assert stats.paired_bootstrap(a, candidates[:, column], 400, 7, images) == pytest.approx(
            (low[column], high[column]), abs=1e-12
        )
        assert stats.sign_flip_permutation(a, candidates[:, column], 400, 7) == pytest.approx(p[column])


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.paired_difference([1.0, 0.0], [1.0]),
        lambda: stats.paired_difference([], []),
        lambda: stats.paired_difference([1.0, math.nan], [1.0, 0.0]),
        lambda: stats.paired_difference([1.0, 0.0], [1.0, 0.0], clusters=[1]),
        lambda: stats.paired_bootstrap([1.0], [0.0], 0, 0),
        lambda: stats.sign_flip_permutation([1.0], [0.0], 0, 0),
        lambda: stats.wilson_interval(3, 2),
        lambda: stats.holm([1.2]),
        lambda: stats.questions_needed(0.0, 0.1),
    ],
)
def test_what_cannot_be_computed_is_an_error(call):
    with pytest.raises(ValueError):
        call()


def test_coverage_of_the_intervals_is_close_to_what_they_promise():
    """400 draws from a known truth: 95 % intervals must hold it in 92 to 98 % of them (binomial noise is 1.1 %)."""
    generator = np.random.default_rng(1)
    truth, hit_bootstrap, hit_clustered, rounds = 0.05, 0, 0, 400
    for _ in range(rounds):
        image = generator.normal(0, 0.2, 100).repeat(3)
        difference = truth + image + generator.normal(0, 0.3, 300)
        labels = np.arange(100).repeat(3)
        zeros = np.zeros(300)
        low, high = stats.paired_bootstrap(zeros, difference, 400, 3, labels)
        hit_bootstrap += low <= truth <= high
        estimate = stats.paired_difference(zeros, difference, labels)
        hit_clustered += estimate.ci_low <= truth <= estimate.ci_high
    assert 0.92 <= hit_bootstrap / rounds <= 0.98
    assert 0.92 <= hit_clustered / rounds <= 0.98


@pytest.mark.parametrize("name", ["lora_r8", "lora_r16"])
def test_stratified_bootstrap_of_the_interquartile_mean_agrees_with_rliable(name):
    scores = np.array(GOLDEN["rliable"]["scores"][name])
    lows, highs = GOLDEN["rliable"]["ci"][name]
    interval = stats.stratified_bootstrap(scores, stats.interquartile_mean, 2000, 0)
    assert interval == pytest.approx((lows[0], highs[0]), abs=1.5e-3)


def test_sums_in_single_precision_are_exact(monkeypatch):
    """Tenths are summed as whole numbers: the same p and the same interval as in double precision."""
    generator = np.random.default_rng(5)
    scores = generator.choice([0.0, 0.3, 0.6, 0.9, 1.0], (300, 4))
    images = list(np.arange(300) // 2)
    pairs = [(0, 1), (0, 2), (2, 3)]
    fast = stats.pairwise_sign_flip_p_values(scores, pairs, 999, 1, images)
    means = stats.resampled_means(scores, 200, 1, images)
    monkeypatch.setattr(stats, "_as_small_integers", lambda values, times=1: (values, 1))
    assert stats.pairwise_sign_flip_p_values(scores, pairs, 999, 1, images) == pytest.approx(fast, abs=0)
    assert stats.resampled_means(scores, 200, 1, images) == pytest.approx(means, abs=1e-14)


def test_pairs_of_columns_give_the_same_p_as_their_difference():
    generator = np.random.default_rng(6)
    scores = generator.random((100, 3))
    p = stats.pairwise_sign_flip_p_values(scores, [(0, 1), (2, 1)], 500, 3)
    assert p[0] == stats.sign_flip_permutation(scores[:, 0], scores[:, 1], 500, 3)
    assert p[1] == stats.sign_flip_permutation(scores[:, 2], scores[:, 1], 500, 3)
