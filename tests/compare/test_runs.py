"""Reading run and sweep folders in any state, and refusing pairs that must not be compared."""

from __future__ import annotations

import json

import pytest
from run_folders import config, write_run, write_sweep

from mgm_exp.compare import PairingError, load_run, load_runs
from mgm_exp.compare.runs import check_pair
from mgm_exp.errors import UserError

SCORES = [1.0, 0.0, 0.6, 1.0]


@pytest.fixture
def pair(tmp_path):
    """Loads runs a and b; b is written with the given options."""
    a = write_run(tmp_path / "a", SCORES)

    def load(scores=SCORES, **options):
        return load_run(a), load_run(write_run(tmp_path / "b", scores, **options))

    return load


def test_a_finished_run_is_read(tmp_path):
    run = load_run(write_run(tmp_path / "a", SCORES, settings=config("lora_r16", seed=3)))
    assert run.is_completed and run.cause == "" and run.seed == 3
    assert run.config["adapter.rank"] == 16 and run.config["train.lr"] == 0.005
    assert not {"name", "trial", "paths.root", "tracker.mode"} & set(run.config)
    assert run.benchmarks == ["demo"]
    assert run.predictions("demo").scores.tolist() == SCORES


def test_equal_runs_are_a_pair(pair):
    left, right = check_pair(*pair(), "demo")
    assert left.ids == right.ids == ("0", "1", "2", "3")


def test_the_order_of_the_lines_does_not_matter(pair, tmp_path):
    a, b = pair()
    path = tmp_path / "b" / "predictions" / "demo.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    left, right = check_pair(a, b, "demo")
    assert (left.scores == right.scores).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("split", "val"), ("prompt_hash", "ffff"), ("ocr_tokens", True), ("metric_version", "m4c-2"), ("circular", True)],
)
def test_another_evaluation_key_is_refused_and_named(pair, key, value):
    a, b = pair(key={key: value})
    with pytest.raises(PairingError, match=rf"evaluation keys differ in {key} \(.* and {value}\)"):
        check_pair(a, b, "demo")


def test_another_number_of_questions_is_refused(pair):
    with pytest.raises(PairingError, match=r"differ in n \(4 and 3\)"):
        check_pair(*pair(SCORES[:3]), "demo")


def test_other_questions_are_refused_and_named(pair):
    a, b = pair(edit=lambda row: {**row, "question_id": row["question_id"] + 2})
    with pytest.raises(PairingError, match=r"question_id 0, 1 only in the first, 4, 5 only in the second"):
        check_pair(a, b, "demo")


@pytest.mark.parametrize(
    "change", [{"answers": ["y"] * 10}, {"prompt_hash": "0"}, {"image_id": "other"}, {"question": "why?"}]
)
def test_the_same_id_with_another_question_or_answer_is_refused(pair, change):
    a, b = pair(edit=lambda row: row | (change if row["question_id"] == 2 else {}))
    with pytest.raises(PairingError, match="reference answers differ for question_id 2"):
        check_pair(a, b, "demo")


def test_predictions_that_do_not_give_the_recorded_accuracy_are_refused(pair):
    a, b = pair(metrics={"demo/accuracy": 0.99})
    with pytest.raises(PairingError, match=r"0\.990000 in result\.json, .* is 0\.650000"):
        check_pair(a, b, "demo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ('{"question_id": 1}\n', "line 1 is damaged"),
        ('{"question_id": 1, "image_id": 1, "score": 2}\n', "not in 0..1"),
        ('{"question_id": 1, "image_id": 1, "score": NaN}\n', "not in 0..1"),
        ('{"question_id": 1, "image_id": 1, "score": 1}\n' * 2, "holds a question twice"),
    ],
)
def test_damaged_predictions_are_refused_and_named(pair, tmp_path, text, message):
    a, b = pair()
    path = tmp_path / "b" / "predictions" / "demo.jsonl"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(PairingError, match=message):
        check_pair(a, b, "demo")


def test_a_run_without_an_end_was_interrupted(tmp_path):
    folder = write_run(tmp_path / "a", SCORES)
    (folder / "result.json").write_text('{"status": "comp')
    assert (load_run(folder).status, load_run(folder).cause) == ("interrupted", "result.json is damaged")
    (folder / "result.json").unlink()
    assert load_run(folder).cause == "it was killed: there is no result.json"


def test_a_failed_run_says_why(tmp_path):
    error = {"type": "DataError", "message": "m", "cause": "an image is missing", "advice": "a"}
    run = load_run(write_run(tmp_path / "a", status="failed", error=error))
    assert (run.status, run.cause) == ("failed", "an image is missing")


def test_a_run_that_is_being_written_is_running(tmp_path):
    from mgm_exp.store import Lease

    folder = write_run(tmp_path / "a", SCORES)
    lease = Lease(folder / ".lease")
    lease.acquire(wait=False)
    try:
        assert load_run(folder).status == "running"
    finally:
        lease.release()
    assert load_run(folder).status == "completed"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="is no run folder"):
        load_runs([tmp_path / "nowhere"])


def test_sweeps_and_runs_may_be_mixed_but_not_repeated(tmp_path):
    sweep = tmp_path / "sweep"
    for number in (0, 1):
        write_run(sweep / str(number), SCORES)
    write_sweep(sweep, [{"number": 1, "params": {"seed": 1}}, {"number": 0, "params": {"seed": 0}}])
    single = write_run(tmp_path / "single", SCORES)
    runs = load_runs([sweep, single])
    assert [run.path.name for run in runs] == ["0", "1", "single"]
    assert [dict(run.params) for run in runs] == [{"seed": 0}, {"seed": 1}, {}]
    with pytest.raises(UserError, match="given twice"):
        load_runs([sweep, sweep / "1"])


def test_a_trial_with_several_seeds_gives_a_run_for_each(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "sweep" / "0" / f"seed_{seed}", SCORES, settings=config(seed=seed))
    write_sweep(tmp_path / "sweep", [{"number": 0, "params": {"adapter": "lora_r8"}}])
    assert [run.seed for run in load_runs([tmp_path / "sweep"])] == [0, 1]


@pytest.mark.parametrize("place", ["../elsewhere", "/etc"])
def test_a_trial_outside_of_its_sweep_is_refused(tmp_path, place):
    write_sweep(tmp_path / "sweep", [{"number": 0, "params": {}, "run_dir": place}])
    with pytest.raises(UserError, match="outside of the sweep"):
        load_runs([tmp_path / "sweep"])


def test_a_damaged_sweep_file_is_named(tmp_path):
    for trials in (3, [3], [{"number": 0}, {"number": "1"}], [{"params": [1]}], [{"run_dir": "a\0b"}]):
        (tmp_path / "sweep.json").write_text(json.dumps({"trials": trials}))
        with pytest.raises(UserError, match=r"sweep\.json is damaged"):
            load_runs([tmp_path])
