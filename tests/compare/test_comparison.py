"""Verdicts on runs whose truth is known, and the content of comparison.json."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from run_folders import config, write_run, write_sweep

import mgm_exp
from mgm_exp.compare import PairingError, compare, write_comparison
from mgm_exp.compare import comparison as room
from mgm_exp.compare.arms import Arm
from mgm_exp.compare.comparison import accuracy_intervals
from mgm_exp.compare.pairs import Panel, judge, pair_rows
from mgm_exp.compare.predictions import Questions
from mgm_exp.errors import UserError


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Enough for the verdicts below, and quick."""
    monkeypatch.setattr(room, "RESAMPLES", 1000)


def random_scores(n: int, seed: int = 0, soft: bool = True) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.choice([0.0, 0.3, 0.6, 0.9, 1.0] if soft else [0.0, 1.0], n)


def only(values: list) -> dict:
    assert len(values) == 1
    return values[0]


@pytest.mark.parametrize("soft", [True, False])
def test_identical_runs_are_tied(tmp_path, soft):
    scores = random_scores(300, soft=soft)
    pair = only(compare([write_run(tmp_path / name, scores) for name in "ab"])["pairs"])
    assert pair["verdict"] == "tied" and pair["p_value"] == pair["p_adjusted"] == 1.0
    assert (pair["difference"], pair["ci_low"], pair["ci_high"]) == (0.0, 0.0, 0.0)
    assert pair["test"] == ("sign_flip_permutation" if soft else "mcnemar_exact")


@pytest.mark.parametrize("soft", [True, False])
def test_two_percent_broken_answers_of_5000_are_called_worse(tmp_path, soft):
    scores = random_scores(5000, soft=soft)
    broken = scores.copy()
    broken[np.random.default_rng(1).permutation(5000)[:100]] = 0.0
    pair = only(compare([write_run(tmp_path / "whole", scores), write_run(tmp_path / "broken", broken)])["pairs"])
    assert pair["verdict"] == "worse" and pair["ci_high"] < 0 and pair["p_adjusted"] < 0.001
    assert pair["a"].endswith("whole") and pair["b"].endswith("broken")
    assert pair["difference"] == pytest.approx(broken.mean() - scores.mean())
    assert pair["n"] == 5000


def test_the_other_way_round_it_is_better(tmp_path):
    scores = random_scores(1000, soft=False)
    broken = scores * (np.arange(1000) >= 40)
    folders = [write_run(tmp_path / "broken", broken), write_run(tmp_path / "whole", scores)]
    assert only(compare(folders)["pairs"])["verdict"] == "better"
    assert only(compare(folders, baseline=folders[1])["pairs"])["verdict"] == "worse"


def paired_tests(scores: np.ndarray, images: list[str] | None = None, *, resamples: int = 1000) -> list[dict]:
    """Each row of scores but the first against the first, judged."""
    n = scores.shape[1]
    names = tuple(str(k) for k in range(n))
    questions = Questions(names, tuple(images or names), ("t",) * n, tuple(range(n)))
    arms = tuple(Arm(str(k), str(k), ()) for k in range(len(scores)))
    panel = Panel("demo", questions, arms, tuple((k,) for k in range(len(scores))), scores.T)
    pairs = [(0, k) for k in range(1, len(scores))]
    rows = pair_rows(panel, pairs, n_comparisons=len(pairs), resamples=resamples, seed=0, alpha=0.05)
    judge(rows, 0.05)
    return rows


@pytest.mark.parametrize("soft", [False, True])
def test_identical_configurations_raise_no_more_false_alarms_than_stated(soft):
    """Sweeps of 16 models of equal skill: with 15 comparisons each, 5 % of the sweeps may hold a false alarm."""
    generator = np.random.default_rng(0)
    sweeps, alarms, unadjusted = (40 if soft else 150), 0, 0
    for _ in range(sweeps):
        skill = generator.beta(1, 1, 200)  # how easy each question is
        scores = (generator.random((16, 200)) < skill).astype(float)
        if soft:
            scores *= generator.choice([0.6, 1.0], 200)
        # Intervals play no part; McNemar's p needs no resample, and permutations are as many as the adjustment needs.
        pairs = paired_tests(scores, resamples=10)
        alarms += any(pair["verdict"] != "tied" for pair in pairs)
        unadjusted += any(pair["p_value"] < 0.05 for pair in pairs)
    assert alarms / sweeps <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / sweeps)
    assert unadjusted / sweeps > 0.15, "without adjustment this simulation must raise alarms, or it shows nothing"


def test_answers_that_move_with_their_image_are_weaker_evidence():
    better = np.zeros(300)
    better[:40] = 1.0  # four images, all their questions
    scores = np.array([np.zeros(300), better])
    alone = paired_tests(scores)
    together = paired_tests(scores, [f"image{k // 10}" for k in range(300)])
    assert only(alone)["verdict"] == "better"
    assert only(together)["verdict"] == "tied" and only(together)["p_value"] < 0.05
    assert only(together)["p_adjusted"] == only(together)["p_by_image"] > 0.05


def test_holm_adjusts_over_all_runs_and_benchmarks(tmp_path):
    scores = random_scores(200)
    folders = [write_run(tmp_path / str(k), {"demo": random_scores(200, k), "textvqa": scores}) for k in range(3)]
    comparison = compare(folders)
    assert comparison["method"]["comparisons"] == len(comparison["pairs"]) == 4
    raw = [pair["p_value"] for pair in comparison["pairs"]]
    adjusted = [pair["p_adjusted"] for pair in comparison["pairs"]]
    assert min(adjusted) == pytest.approx(min(1, 4 * min(raw)))
    assert set(comparison["minimum_detectable_difference"]) == {"demo", "textvqa"}


def test_many_runs_can_still_be_told_apart():
    """The smallest p that permutations can give must survive the adjustment for many comparisons."""
    pairs = paired_tests(np.array([np.zeros(60), *[np.full(60, 0.9)] * 40]), resamples=100)
    assert {pair["verdict"] for pair in pairs} == {"better"}


def test_contract_of_the_content(tmp_path, demo_sweep):
    comparison = compare([demo_sweep])
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison
    assert comparison["benchmarks"] == ["demo"]
    first, second, third, failed = comparison["runs"]
    assert [run["label"] for run in comparison["runs"]] == ["lora_r8", "lora_r16", "full", "full lr=9"]
    assert comparison["baseline"] == first["run_dir"]
    assert first["differs"]["adapter.rank"] == 8 and second["differs"]["adapter.rank"] == 16
    assert "model.name" not in first["differs"] and first["seeds"] == [0]
    accuracy = third["metrics"]["demo/accuracy"]
    assert accuracy["ci_low"] < accuracy["value"] < accuracy["ci_high"] and accuracy["n"] == 600
    assert third["metrics"]["demo/accuracy[colour]"]["n"] == 200
    assert (failed["status"], failed["cause"]) == ("failed", "the loss is not finite at step 12")
    assert [(pair["b"], pair["verdict"]) for pair in comparison["pairs"]] == [
        (second["run_dir"], "tied"),
        (third["run_dir"], "better"),
    ]
    wanted = "a b benchmark n difference ci_low ci_high p_value p_adjusted test verdict".split()
    assert all(set(wanted) <= set(pair) for pair in comparison["pairs"])
    names = [(row["name"], row["value"]) for row in comparison["baselines"]]
    assert names == [("question_only", 0.21), ("base", 0.0), ("aligned", 0.012)]
    assert comparison["confounded"] == {"train.lr": ["adapter.name"]}


def test_written_comparisons_name_runs_relative_to_themselves(demo_sweep):
    path = write_comparison(compare([demo_sweep]), demo_sweep)
    written = json.loads(path.read_text())
    assert path == demo_sweep / "comparison.json"
    assert [run["run_dir"] for run in written["runs"]] == ["0", "1", "2", "3"]
    assert (written["baseline"], written["pairs"][0]["a"], written["pairs"][0]["b"]) == ("0", "0", "1")


def test_a_baseline_is_found_by_folder_label_or_number(demo_sweep):
    for asked in (demo_sweep / "2", str(demo_sweep / "2"), "full", "2"):
        comparison = compare([demo_sweep], baseline=asked)
        assert comparison["baseline"] == str(demo_sweep / "2")
        assert {pair["verdict"] for pair in comparison["pairs"]} == {"worse"}


def test_an_unknown_or_failed_baseline_is_refused(demo_sweep):
    with pytest.raises(UserError, match=r"'qlora' is none of the runs; .* lora_r8 \("):
        compare([demo_sweep], baseline="qlora")
    with pytest.raises(UserError, match="it is failed"):
        compare([demo_sweep], baseline="3")


def test_runs_given_by_hand_with_other_evaluation_keys_are_refused(tmp_path):
    folders = [
        write_run(tmp_path / "a", [1.0, 0.0], key={"ocr_tokens": True}),
        write_run(tmp_path / "b", [1.0, 0.0]),
    ]
    with pytest.raises(PairingError, match=r"ocr_tokens \(True and False\)"):
        compare(folders)
    comparison = compare(folders, strict=False)
    assert comparison["pairs"] == [] and "ocr_tokens" in only(comparison["refused"])["reason"]


def test_in_a_sweep_what_cannot_be_compared_is_listed_and_the_rest_compared(tmp_path):
    scores = random_scores(50)
    for number, ocr in enumerate([True, True, False]):
        write_run(tmp_path / str(number), scores, key={"ocr_tokens": ocr})
    write_sweep(tmp_path, [{"number": k, "params": {"seed": k}} for k in range(3)])
    comparison = compare(tmp_path)
    assert only(comparison["pairs"])["b"] == str(tmp_path / "1")
    assert only(comparison["refused"])["b"] == str(tmp_path / "2")


def test_a_sweep_without_a_completed_run_has_no_baseline(tmp_path):
    write_run(tmp_path / "0", status="failed", error={"cause": "no space left", "advice": None})
    write_sweep(tmp_path, [{"number": 0, "params": {"seed": 0}}])
    comparison = compare(tmp_path)
    assert comparison["baseline"] is None and comparison["pairs"] == []


def test_nothing_to_compare_is_said(tmp_path):
    write_sweep(tmp_path, [])
    with pytest.raises(UserError, match="nothing to compare"):
        compare(tmp_path)


def test_runs_on_other_software_are_pointed_out(tmp_path):
    folders = [write_run(tmp_path / name, [1.0, 0.0]) for name in "ab"]
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    manifest["packages"]["torch"] = "2.14.0"
    manifest["git"]["commit"] = "def"
    (folders[1] / "manifest.json").write_text(json.dumps(manifest))
    assert compare(folders)["environment"] == {"torch": ["2.13.0", "2.14.0"], "git.commit": ["abc", "def"]}


def test_labels_name_the_choice_and_what_follows_from_it_is_left_out(tmp_path):
    settings = [config("lora_r8"), config("full"), config("full", train__max_steps=9)]
    folders = [write_run(tmp_path / str(k), [1.0, 0.0], settings=s) for k, s in enumerate(settings)]
    comparison = compare(folders)
    assert [run["label"] for run in comparison["runs"]] == [
        "lora_r8 max_steps=60",
        "full max_steps=60",
        "full max_steps=9",
    ]


def test_equal_configurations_are_told_apart_by_their_folder(tmp_path):
    folders = [write_run(tmp_path / "runs" / name, [1.0, 0.0]) for name in ("one", "two")]
    assert [run["label"] for run in compare(folders)["runs"]] == ["(runs/one)", "(runs/two)"]


def test_baselines_that_differ_between_runs_are_shown_for_each(tmp_path):
    for number, (data, value) in enumerate([("raw", 0.1), ("raw", 0.1), ("blip2", 0.4)]):
        write_run(tmp_path / str(number), [1.0, 0.0], metrics={"demo/baseline_aligned": value})
        assert data
    params = [
        {"data": "raw", "adapter": "full"},
        {"data": "raw", "adapter": "lora_r8"},
        {"data": "blip2", "adapter": "full"},
    ]
    write_sweep(tmp_path, [{"number": k, "params": p} for k, p in enumerate(params)])
    rows = compare(tmp_path)["baselines"]
    assert [(row["label"], row["value"]) for row in rows] == [
        ("aligned only, raw", 0.1),
        ("aligned only, blip2 full", 0.4),
    ]


def test_intervals_of_a_rate_are_wilson_and_widen_when_images_repeat():
    from mgm_exp.compare.statistics import wilson_interval

    scores = np.array([1.0] * 30 + [0.0] * 70)
    alone = [str(k) for k in range(100)]
    low, high = accuracy_intervals(scores[:, None], alone)
    assert (low[0], high[0]) == pytest.approx(wilson_interval(30, 100))
    shared = [str(k // 10) for k in range(100)]
    wider = accuracy_intervals(scores[:, None], shared)
    assert wider[1][0] - wider[0][0] > 2 * (high[0] - low[0])
    assert accuracy_intervals(np.ones((5, 1)), alone[:5])[0][0] < 0.6, "all right on five questions proves little"


def test_the_room_can_be_called_as_a_function(tmp_path):
    folders = [write_run(tmp_path / name, [1.0, 0.0]) for name in "ab"]
    assert mgm_exp.compare(folders) == compare(folders)
    assert mgm_exp.compare(folders, baseline="b")["baseline"] == str(folders[1])


def test_comparing_imports_no_torch(tmp_path):
    import subprocess
    import sys

    program = "import sys, mgm_exp.compare; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
