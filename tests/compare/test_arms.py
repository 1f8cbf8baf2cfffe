"""Runs that differ in their seed alone are one arm, and nothing else is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from run_folders import config, write_run, write_sweep

from mgm_exp.compare import compare, print_comparison, write_comparison
from mgm_exp.compare import comparison as room
from mgm_exp.compare.arms import arms_of
from mgm_exp.compare.runs import load_run, load_runs
from mgm_exp.compare.wording import notes, verdict_lines


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(room, "RESAMPLES", 1000)


def scores(seed: int, rate: float = 0.5, n: int = 400) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < rate).astype(float)


@pytest.fixture
def seeds_sweep(tmp_path):
    """lora_r8 and full with three seeds each, as ``sweep.seeds`` leaves them; one seed of full failed."""
    for number, (adapter, rate) in enumerate([("lora_r8", 0.5), ("full", 0.8)]):
        for seed in range(3):
            failed = (number, seed) == (1, 2)
            write_run(
                tmp_path / "sweep" / str(number) / f"seed_{seed}",
                None if failed else scores(10 * number + seed, rate),
                settings=config(adapter, seed=seed),
                status="failed" if failed else "completed",
                error={"cause": "out of memory"} if failed else None,
            )
    return write_sweep(
        tmp_path / "sweep",
        [{"number": 0, "params": {"adapter": "lora_r8"}}, {"number": 1, "params": {"adapter": "full"}}],
    )


def test_seeds_of_a_configuration_are_one_arm(seeds_sweep):
    arms = arms_of(load_runs([seeds_sweep]))
    assert [arm.label for arm in arms] == ["lora_r8", "full"]
    assert [len(arm.completed) for arm in arms] == [3, 2]
    assert arms[0].id == str(seeds_sweep / "0" / "seed_0")


def test_pairs_are_between_arms(seeds_sweep):
    found = compare(seeds_sweep)
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"]) == (found["arms"][0]["id"], found["arms"][1]["id"])
    assert pair["n_seeds"] == [3, 2] and pair["verdict"] == "better" and pair["test"] == "seeds_and_questions_t"
    means = [arm["metrics"]["demo/accuracy"]["value"] for arm in found["arms"]]
    assert pair["difference"] == pytest.approx(means[1] - means[0])
    assert pair["ci_low"] < pair["difference"] < pair["ci_high"] and pair["standard_error"] > pair["seed_error"] > 0
    assert [run["arm"] for run in found["runs"]] == [pair["a"]] * 3 + [pair["b"]] * 3
    assert [arm["seeds"] for arm in found["arms"]] == [[0, 1, 2], [0, 1]]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_spread_of_seeds_stands_beside_that_of_questions(seeds_sweep):
    found = compare(seeds_sweep)
    accuracy = found["arms"][0]["metrics"]["demo/accuracy"]
    values = [run["metrics"]["demo/accuracy"]["value"] for run in found["runs"][:3]]
    assert accuracy["value"] == pytest.approx(np.mean(values))
    assert accuracy["seed_sd"] == pytest.approx(np.std(values, ddof=1))
    assert accuracy["n_seeds"] == 3 and 0 < accuracy["standard_error"] < 0.05
    assert accuracy["ci_low"] < accuracy["value"] < accuracy["ci_high"]
    assert found["arms"][0]["iqm"]["n_seeds"] == 3
    text = "\n".join(notes(found))
    assert "standard deviation between seeds in points: lora_r8" in text
    assert "another seed may train another model" not in text
    assert verdict_lines(found)[0].endswith("n=400, 2 and 3 seeds")


@pytest.mark.parametrize("asked", ["full", "1", "full seed=1"])
def test_a_baseline_may_be_named_by_its_arm_its_trial_or_a_run_of_it(seeds_sweep, asked):
    assert compare(seeds_sweep, baseline=asked)["baseline"] == str(seeds_sweep / "1" / "seed_0")


def test_a_baseline_may_be_a_folder_of_seeds(seeds_sweep):
    assert compare(seeds_sweep, baseline=seeds_sweep / "1")["baseline"] == str(seeds_sweep / "1" / "seed_0")


def test_written_comparisons_name_arms_relative_to_themselves(seeds_sweep):
    written = json.loads(write_comparison(compare(seeds_sweep), seeds_sweep).read_text())
    assert [arm["id"] for arm in written["arms"]] == ["0/seed_0", "1/seed_0"]
    assert written["runs"][1]["arm"] == written["pairs"][0]["a"] == written["baseline"] == "0/seed_0"
    assert str(seeds_sweep) not in json.dumps({key: written[key] for key in ("arms", "pairs", "groups", "baselines")})


def test_an_arm_is_one_row_that_says_how_many_seeds(seeds_sweep, capsys):
    print_comparison(compare(seeds_sweep))
    out = capsys.readouterr().out
    assert "lora_r8 (3 seeds)" in out and "full (3 seeds)" in out and "2 of 3" in out
    assert "full seed=2 failed: out of memory" in out


def test_two_seeds_alone_are_compared_with_each_other(tmp_path):
    folders = [write_run(tmp_path / str(k), scores(k), settings=config(seed=k)) for k in range(2)]
    found = compare(folders)
    assert len(found["arms"]) == 2 and found["pairs"][0]["verdict"] == "tied"
    assert found["pairs"][0]["test"] == "mcnemar_exact"


def test_a_run_that_was_repeated_with_the_same_seed_is_not_another_draw(tmp_path):
    folders = [write_run(tmp_path / str(k), scores(k), settings=config(seed=0)) for k in range(2)]
    folders.append(write_run(tmp_path / "full", scores(3), settings=config("full")))
    assert len(arms_of([load_run(folder) for folder in folders])) == 3


def test_an_interrupted_repetition_stands_beside_the_arm(tmp_path):
    """A trial that was given up and started anew: its seed is completed elsewhere."""
    write_run(tmp_path / "0", settings=config("full", seed=0), status="interrupted", error={"cause": "SIGTERM"})
    for number, (adapter, seed) in enumerate([("full", 0), ("full", 1), ("lora_r8", 0), ("lora_r8", 1)], 1):
        write_run(tmp_path / str(number), scores(number), settings=config(adapter, seed=seed))
    adapters = ["full", "full", "full", "lora_r8", "lora_r8"]
    trials = [{"number": k, "params": {"adapter": adapter}} for k, adapter in enumerate(adapters)]
    found = compare(write_sweep(tmp_path, trials))
    assert [(arm["label"], len(arm["runs"]), arm["status"]) for arm in found["arms"]] == [
        ("full (trial 1)", 2, "completed"),
        ("full (trial 0)", 1, "interrupted"),
        ("lora_r8", 2, "completed"),
    ]
    assert found["pairs"][0]["n_seeds"] == [2, 2]


def test_an_arm_with_one_seed_borrows_the_spread_of_the_others(tmp_path):
    folders = [write_run(tmp_path / f"r8_{k}", scores(k), settings=config(seed=k)) for k in range(3)]
    folders.append(write_run(tmp_path / "full", scores(9, 0.7), settings=config("full")))
    found = compare(folders)
    (pair,) = found["pairs"]
    sd = found["arms"][0]["metrics"]["demo/accuracy"]["seed_sd"]
    assert pair["n_seeds"] == [3, 1]
    assert pair["seed_error"] == pytest.approx(sd * np.sqrt(1 / 3 + 1))
    assert "What was run with one seed is taken to vary between seeds as much as the rest" in notes(found)


def test_runs_of_an_arm_that_cannot_be_pooled_are_refused(tmp_path):
    folders = [
        write_run(tmp_path / str(k), scores(k), settings=config(seed=k), key={"ocr_tokens": k == 2}) for k in range(3)
    ]
    folders.append(write_run(tmp_path / "full", scores(9), settings=config("full")))
    found = compare(folders, strict=False)
    assert [refused["b"] for refused in found["refused"]] == [str(folders[2])]
    assert found["pairs"][0]["n_seeds"] == [2, 1]
