from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import LimitsConfig, RecipeConfig
from mgm_exp.data import CurationReport, Policy, Source, curate, read_records, read_report
from mgm_exp.data.augmentation import Augmentation
from mgm_exp.data.curation import Recaptioned, Selection
from mgm_exp.data.kinds import IMAGE_KINDS, KINDS
from mgm_exp.data.recipe import resolve
from mgm_exp.errors import DataError

from .conftest import chat, lines_of, pair, picture, write_lines
from .test_formats import BAD
from .test_images import damaged_files, outside

ANY = Policy(max_bad_share=0.99)
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def run(
    path: Path, root: Path, processor: Any, policy: Policy = ANY, stage: str = "align", **options: Any
) -> tuple[CurationReport, Path]:
    out = path.parent / f"out-{path.stem}-{len(os.listdir(path.parent))}"
    out.mkdir()
    return curate({stage: Source(path, root, processor)}, out, policy=policy, workers=0, **options), out


def kinds_of(out: Path) -> dict[str, str]:
    return {row["id"]: row["kind"] for row in lines_of(out / "rejected.jsonl")}


def test_good_rows_become_records_in_order(tmp_path: Path, root: Path, processor: Any) -> None:
    rows = [pair("b", "0.png", "a red sign"), chat("a", "1.png", "<image>\nq", "x"), chat("c", None, "q", "y")]
    report, out = run(write_lines(tmp_path / "a.jsonl", rows), root, processor)
    records = list(read_records(out / "align.jsonl"))
    assert [(r.id, r.image, r.conversations[-1].text) for r in records] == [
        ("b", "0.png", "a red sign"),
        ("a", "1.png", "x"),
        ("c", None, "y"),
    ]
    stage = report.stages["align"]
    assert (stage.rows, stage.kept, stage.rejected, stage.images) == (3, 3, {}, 2)
    assert stage.changed == {"caption_prompt_added": 1}
    assert lines_of(out / "rejected.jsonl") == []
    assert read_report(out) == report
    values = json.loads((out / "report.json").read_text())
    assert values["align"]["kept"] == 3 and values["fingerprint"] == report.fingerprint
    assert values["align"]["image_root"] == str(root)


def test_tokens_are_counted_as_the_model_sees_them(tmp_path: Path, root: Path, processor: Any) -> None:
    rows = [chat("a", "0.png", "<image>\nq", "x"), chat("b", None, "q", "y")]
    report, out = run(write_lines(tmp_path / "a.jsonl", rows), root, processor)
    encoded = [processor.encode(r.turns(), has_image=r.image is not None) for r in read_records(out / "align.jsonl")]
    stage = report.stages["align"]
    lengths = [len(encoded[0]["input_ids"]) + 15, len(encoded[1]["input_ids"])]
    assert stage.supervised_tokens == sum(label != -100 for e in encoded for label in e["labels"])
    assert stage.tokens == sum(lengths) and stage.truncated == 0
    assert stage.lengths["max"] == max(lengths) and stage.lengths["mean"] == sum(lengths) / 2


def test_every_kind_of_damage_is_named_and_nothing_is_lost(tmp_path: Path, root: Path, processor: Any) -> None:
    rows: list[Any] = []
    expected: dict[str, str] = {}
    for name, (content, kind) in damaged_files().items():
        (root / name).write_bytes(content)
        rows.append(pair(f"image {name}", name))
        expected[f"image {name}"] = kind
    for name, (path, kind) in outside(root).items():
        if name not in ("empty",):  # the reader's business: no path at all
            rows.append(pair(f"path {name}", path))
            expected[f"path {name}"] = kind
    for kind, bad_rows in BAD.items():
        for number, bad in enumerate(bad_rows):
            if isinstance(bad, dict) and kind != "bad_id":
                rows.append({**bad, "id": f"row {kind} {number}"})
                expected[f"row {kind} {number}"] = kind
    picture().convert("L").convert("F").save(root / "float.tif")
    rows.append(pair("float", "float.tif"))
    rows.append(chat("marker", "0.png", "<image>\nsay <start_of_turn>model\nnow", "no"))
    rows.append(chat("eos", "0.png", "<image>\nq", "an answer <eos> that ends twice"))
    rows.append(chat("long question", "0.png", "<image>\n" + "why " * 200, "no"))
    rows.append(chat("long text", None, "why " * 200, "no"))
    expected |= {"float": "wrong_mode", "marker": "no_label", "eos": "no_label"}
    expected |= {"long question": "labels_truncated", "long text": "labels_truncated"}
    good = [pair(f"good {i}", f"{i}.png") for i in range(10)]
    rows = good[:5] + rows + good[5:] + [pair("good 3", "3.png"), '{"id": "not json', '{"id": "again", "id": "again"}']
    report, out = run(write_lines(tmp_path / "a.jsonl", rows), root, processor)

    rejected = lines_of(out / "rejected.jsonl")
    assert {row["id"]: row["kind"] for row in rejected[:-2]} == expected
    assert [row["kind"] for row in rejected[-2:]] == ["not_json", "duplicate_key"]
    assert all(row["kind"] in KINDS and row["detail"] and row["stage"] == "align" for row in rejected)
    assert [row["line"] for row in rejected] == sorted(row["line"] for row in rejected)
    kept = [record.id for record in read_records(out / "align.jsonl")]
    assert kept == [*(row["id"] for row in good), "good 3#2"]
    stage = report.stages["align"]
    assert stage.changed["id_renamed"] == 1
    assert stage.rows == len(rows) == stage.kept + sum(stage.rejected.values())
    assert stage.rejected == dict(Counter(row["kind"] for row in rejected))


def test_an_answer_that_is_cut_in_part_is_kept_and_counted(tmp_path: Path, root: Path, processor: Any) -> None:
    rows = [chat("a", "0.png", "<image>\nq", "word " * 200), chat("b", "1.png", "<image>\nq", "x")]
    report, _ = run(write_lines(tmp_path / "a.jsonl", rows), root, processor)
    stage = report.stages["align"]
    assert (stage.kept, stage.truncated) == (2, 1)
    assert stage.lengths["max"] > 128 >= stage.tokens / 2


@pytest.fixture
def mixed(tmp_path: Path, root: Path) -> Path:
    """200 rows over 100 pictures; rows 17, 117 and 50 are bad."""
    for i in range(10, 100):
        picture(6, 6, seed=i).save(root / f"{i}.png")
    (root / "17.png").write_bytes(b"")
    rows: list[Any] = [pair(f"r{i}", f"{i % 100}.png", f"caption {i}") for i in range(200)]
    rows[50] = "{"
    return write_lines(tmp_path / "mixed.jsonl", rows)


def test_processes_change_neither_order_nor_content(mixed: Path, root: Path, processor: Any, tmp_path: Path) -> None:
    outputs = []
    for workers in (0, 2):
        out = tmp_path / f"workers-{workers}"
        out.mkdir()
        report = curate({"align": Source(mixed, root, processor)}, out, policy=ANY, workers=workers)
        outputs.append((report, {name: (out / name).read_bytes() for name in sorted(os.listdir(out))}))
    assert outputs[0] == outputs[1]
    assert sorted(outputs[0][1]) == [
        "align.jsonl",
        "examples.json",
        "fates-align.jsonl",
        "rejected.jsonl",
        "report.json",
    ]
    assert outputs[0][0].stages["align"].rejected == {"not_json": 1, "zero_bytes": 2}


def test_fail_stops_at_the_first_bad_row_with_its_name(mixed: Path, root: Path, processor: Any) -> None:
    with pytest.raises(DataError, match=r"mixed\.jsonl, line 18, row 17 \(id r17\): zero_bytes") as caught:
        run(mixed, root, processor, Policy(bad_rows="fail"))
    assert "data.bad_rows=skip" in caught.value.advice


def test_too_many_bad_rows_stop_the_run_and_are_named(mixed: Path, root: Path, processor: Any) -> None:
    with pytest.raises(
        DataError, match=r"3 of 200 rows .* data\.max_bad_share=0\.01 .*2 zero_bytes \(first: mixed\.jsonl, line 18"
    ) as caught:
        run(mixed, root, processor, Policy(max_bad_share=0.01))
    listed = caught.value.advice.split("named in ")[1].split(". Repair")[0]
    assert len(lines_of(Path(listed))) == 3
    run(mixed, root, processor, Policy(max_bad_share=0.015))


def test_a_wrong_image_root_is_one_clear_error(mixed: Path, tmp_path: Path, processor: Any) -> None:
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    with pytest.raises(DataError, match=r"200 of 200 rows .* none is left") as caught:
        run(mixed, empty, processor)
    assert "data.image_root" in caught.value.advice


def test_a_file_that_was_cut_stops_the_run_under_every_policy(tmp_path: Path, root: Path, processor: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([pair(str(i), f"{i}.png") for i in range(10)])[:-20])
    with pytest.raises(DataError, match=r"cannot be trusted.*file_ends_early"):
        run(path, root, processor)


def test_only_the_first_rows_are_read_where_asked(mixed: Path, root: Path, processor: Any) -> None:
    report, out = run(mixed, root, processor, replace(ANY, max_samples=20))
    assert (report.stages["align"].rows, report.stages["align"].kept) == (20, 19)
    assert [record.id for record in read_records(out / "align.jsonl")][-1] == "r19"


def test_two_stages_with_one_source_are_curated_once(mixed: Path, root: Path, processor: Any, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    out.mkdir()
    source = Source(mixed, root, processor)
    report = curate(
        {"align": source, "instruct": source}, out, policy=ANY, workers=0, on_progress=lambda *args: seen.append(args)
    )
    assert report.stages["align"] == report.stages["instruct"]
    assert (out / "align.jsonl").read_bytes() == (out / "instruct.jsonl").read_bytes()
    assert Counter(row["stage"] for row in lines_of(out / "rejected.jsonl")) == {"align": 3, "instruct": 3}
    assert {what for what, _, _ in seen} == {"curate align"} and seen[-1][1:] == (200, 200)


def test_two_sources_are_curated_apart(tmp_path: Path, root: Path, processor: Any) -> None:
    align = write_lines(tmp_path / "a.jsonl", [pair("a", "0.png"), pair("b", "gone.png")])
    instruct = write_lines(tmp_path / "b.jsonl", [chat("c", "0.png", "<image>\nq", "x")])
    out = tmp_path / "out"
    out.mkdir()
    sources = {"align": Source(align, root, processor), "instruct": Source(instruct, root, processor)}
    report = curate(sources, out, policy=ANY, workers=0)
    assert {name: stage.kept for name, stage in report.stages.items()} == {"align": 1, "instruct": 1}
    assert kinds_of(out) == {"b": "missing"}
    assert CurationReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_absolute_paths_below_the_root_become_relative(tmp_path: Path, root: Path, processor: Any) -> None:
    (root / "deep").mkdir()
    picture().save(root / "deep" / "a.png")
    _, out = run(write_lines(tmp_path / "a.jsonl", [pair("a", str(root / "deep" / "a.png"))]), root, processor)
    assert read_records(out / "align.jsonl")[0].image == "deep/a.png"


def test_rows_that_an_earlier_step_rejected_are_counted_and_named(tmp_path: Path, root: Path, processor: Any) -> None:
    before = tmp_path / "before.jsonl"
    bad = {"file": "raw.jsonl", "line": 4, "index": 3, "id": "x", "kind": "missing", "detail": "x.jpg is not there"}
    write_lines(before, [bad])
    path = write_lines(tmp_path / "a.jsonl", [pair("a", "0.png"), pair("b", "1.png"), pair("c", "2.png")])
    out = tmp_path / "out"
    out.mkdir()
    said = write_lines(
        tmp_path / "fates.jsonl",
        [
            {"id": "a", "fate": "changed", "step": "recaption", "detail": {"score_new": 0.5}},
            {"id": "x", "fate": "dropped", "step": "recaption", "detail": {"kind": "missing"}},
            {"id": "b", "fate": "kept", "step": "recaption", "detail": {"why": "not better"}},
            {"id": "c", "fate": "added", "step": "recaption", "detail": {"of": "b"}},
        ],
    )
    source = Source(path, root, processor, recaptioned=Recaptioned(before, said, changed=1, added=1))
    report = curate({"align": source}, out, policy=replace(ANY, max_samples=3), workers=0)
    stage = report.stages["align"]
    assert (stage.rows, stage.kept) == (4, 3)
    assert lines_of(out / "rejected.jsonl") == [{"stage": "align", **bad}]
    assert [(line["id"], line["fate"]) for line in lines_of(out / "fates-align.jsonl")] == [
        ("x", "dropped"),
        ("a", "changed"),
        ("b", "changed"),
        ("c", "changed"),
    ]
    assert [line.get("recaption") for line in lines_of(out / "fates-align.jsonl")] == [
        None,
        {"score_new": 0.5},
        {"why": "not better"},
        {"of": "b"},
    ]
    steps = {step["step"]: step for step in stage.waterfall}
    assert steps["images"]["rows_in"] == 3 and steps["images"]["dropped"] == 1
    assert (steps["recaption"]["changed"], steps["recaption"]["added"], steps["recaption"]["rows_out"]) == (1, 1, 3)


def test_the_fingerprint_follows_records_and_pixels_and_not_places(tmp_path: Path, root: Path, processor: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair("a", "0.png"), pair("b", "1.png")])
    first, _ = run(path, root, processor)
    moved = tmp_path / "moved"
    os.rename(root, moved)
    again, _ = run(path, moved, processor)
    assert again.fingerprint == first.fingerprint
    picture(seed=99).save(moved / "1.png")
    changed, _ = run(path, moved, processor)
    assert changed.fingerprint != first.fingerprint


def test_docs_list_every_kind() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []
    assert set(IMAGE_KINDS) <= set(KINDS)


def pairs_and_values(folder: Path, values: list[dict[str, Any]]) -> tuple[Path, Path]:
    rows = [pair(row["id"], f"{n}.png", f"caption {row['id']}") for n, row in enumerate(values)]
    return write_lines(folder / "a.jsonl", rows), write_lines(folder / "values.jsonl", values)


def selected(folder: Path, root: Path, processor: Any, values: list[dict[str, Any]], **limits: Any) -> tuple[Any, Path]:
    path, measured = pairs_and_values(folder, values)
    recipe = replace(RecipeConfig(), **limits)
    out = folder / "out"
    out.mkdir()
    source = Source(path, root, processor, selection=Selection(measured, resolve(recipe, measured)))
    return curate({"align": source}, out, policy=ANY, workers=0).stages["align"], out


def test_a_recipe_drops_by_the_first_limit_that_is_broken(tmp_path: Path, root: Path, processor: Any) -> None:
    values = [
        {"id": "short", "words_num": 2, "text_length": 5},
        {"id": "fits", "words_num": 4, "text_length": 20},
        {"id": "long", "words_num": 9, "text_length": 99},
    ]
    limits = {"words_num": LimitsConfig(min=4), "text_length": LimitsConfig(min=20, max=50)}
    stage, out = selected(tmp_path, root, processor, values, **limits)
    assert [record.id for record in read_records(out / "align.jsonl")] == ["fits"]
    assert (stage.rows, stage.kept, stage.rejected) == (3, 1, {})
    assert stage.dropped == {"words_num": 1, "text_length": 1}
    fates = {line.pop("id"): line for line in lines_of(out / "fates-align.jsonl")}
    assert fates["short"] == {"fate": "dropped", "step": "words_num", "value": 2, "limit": "min 4", "line": 1}
    assert fates["long"] == {"fate": "dropped", "step": "text_length", "value": 99, "limit": "max 50", "line": 3}
    assert fates["fits"]["fate"] == "changed" and fates["fits"]["changes"] == ["caption_prompt_added"]
    steps = [(step["step"], step["rows_in"], step["dropped"], step["rows_out"]) for step in stage.waterfall]
    assert steps == [
        ("rows", 3, 0, 3),
        ("images", 3, 0, 3),
        ("words_num", 3, 1, 2),
        ("text_length", 2, 1, 1),
        ("trainable", 1, 0, 1),
    ]


def test_a_percentile_is_a_value_of_the_data(tmp_path: Path, root: Path, processor: Any) -> None:
    values = [{"id": f"r{n}", "words_num": n + 1} for n in range(10)]
    stage, out = selected(tmp_path, root, processor, values, words_num=LimitsConfig(min="p25", max="p75"))
    words = sorted(row["words_num"] for row in values)
    lower, upper = words[int(0.25 * 9)], words[-int(0.25 * 9) - 1]
    assert stage.limits == {"words_num": {"min": lower, "min_given": "p25", "max": upper, "max_given": "p75"}}
    kept = [f"r{n}" for n, row in enumerate(values) if lower <= row["words_num"] <= upper]
    assert [record.id for record in read_records(out / "align.jsonl")] == kept


def test_rows_that_were_not_measured_pass(tmp_path: Path, root: Path, processor: Any) -> None:
    rows = [
        pair("a", "0.png"),
        chat("talk", "1.png", "<image>\nq", "x", "q2", "y"),
        chat("text", None, "q", "y"),
        pair("b", "2.png"),
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    values = write_lines(tmp_path / "values.jsonl", [{"id": "a", "words_num": 1}, {"id": "b", "words_num": 8}])
    out = tmp_path / "out"
    out.mkdir()
    limits = resolve(replace(RecipeConfig(), words_num=LimitsConfig(min=4)), values)
    source = Source(path, root, processor, selection=Selection(values, limits))
    curate({"align": source}, out, policy=ANY, workers=0)
    assert [record.id for record in read_records(out / "align.jsonl")] == ["talk", "text", "b"]


def test_a_recipe_that_keeps_nothing_says_what_dropped_the_rows(tmp_path: Path, root: Path, processor: Any) -> None:
    with pytest.raises(DataError, match=r"keeps none of the 2 rows.*words_num dropped 2.*words_num: min 40"):
        selected(tmp_path, root, processor, [{"id": "a", "words_num": 1}, {"id": "b", "words_num": 3}],
                 words_num=LimitsConfig(min=40))  # fmt: skip


def test_duplicated_pairs_are_rows_of_their_own(tmp_path: Path, root: Path, processor: Any) -> None:
    rows = [pair("a", "0.png"), chat("talk", "1.png", "<image>\nq", "x", "q2", "y")]
    path, out = write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out"
    out.mkdir()
    source = Source(path, root, processor, selection=Selection(augmentation=Augmentation(duplicate=3)))
    stage = curate({"align": source}, out, policy=ANY, workers=0).stages["align"]
    assert [record.id for record in read_records(out / "align.jsonl")] == ["a", "a#d2", "a#d3", "talk"]
    assert (stage.rows, stage.kept, stage.changed["duplicated"]) == (2, 4, 2)
    assert stage.text["captions"] == 3  # a copy says nothing new: the caption and two answers
    assert stage.waterfall[-1] == {
        "step": "augment", "rows_in": 2, "dropped": 0, "changed": 0, "added": 2, "rows_out": 4
    }  # fmt: skip
    assert [line["fate"] for line in lines_of(out / "fates-align.jsonl")] == ["changed", "added", "added", "kept"]


def test_damaged_text_is_used_and_counted(tmp_path: Path, root: Path, processor: Any) -> None:
    rows = [pair("a", "0.png", "caf\u00c3\u00a9 sign"), pair("b", "1.png", "bell\x07"), pair("c", "2.png", "caf\u00e9")]
    report, _ = run(write_lines(tmp_path / "a.jsonl", rows), root, processor)
    assert (report.stages["align"].kept, report.stages["align"].changed["damaged_text"]) == (3, 2)


def test_statistics_stand_beside_those_of_what_was_replaced(tmp_path: Path, root: Path, processor: Any) -> None:
    rows = [
        {**pair("a", "0.png", "a red sign that reads STOP"), "raw_caption": "sign"},
        pair("b", "1.png", "a blue tag"),
    ]
    stage = run(write_lines(tmp_path / "a.jsonl", rows), root, processor)[0].stages["align"]
    assert stage.text["words_mean"] == (6 + 3) / 2
    assert stage.raw_text is not None and stage.raw_text["words_mean"] == (1 + 3) / 2
