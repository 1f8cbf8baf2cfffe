"""Data-Juicer itself, measuring: the same values as ours, all rows, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mgm_exp.data.data_juicer import Operator, Pair, measure, measure_builtin, write_recipe
from mgm_exp.data.exploration.special_characters import SPECIAL_CHARACTERS
from mgm_exp.data.images import open_image
from mgm_exp.data.recipe import Bound, Limits
from mgm_exp.errors import ConfigError, DataError, MissingDependencyError, ModelError

from ..conftest import picture
from .conftest import ON_ITS_SIDE, WITHOUT_IMAGE, Measured, make_pairs, simple_operators, write_pairs


def test_every_row_has_its_values_in_order(measured: Measured) -> None:
    assert [row["id"] for row in measured.values] == [pair.id for pair in measured.pairs]
    assert measured.report.values == tuple(list(measured.values[0])[1:])
    assert (measured.report.rows, measured.report.from_before) == (len(measured.pairs), 0)
    assert measured.report.engine == "data-juicer 1.6.1"
    assert len(list((measured.work / "shards").iterdir())) == 2


def test_the_builtin_engine_gives_the_same_bytes(measured: Measured, tmp_path: Path) -> None:
    report = measure_builtin(measured.rows, measured.root, simple_operators(), out=tmp_path)
    builtin = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("id", *report.values)
    assert [{key: row[key] for key in keys} for row in measured.values] == builtin
    shape = builtin[ON_ITS_SIDE]
    assert (shape["image_width"], shape["image_height"]) == (14, 20 + ON_ITS_SIDE)  # turned upright


def test_special_tokens_are_not_counted(measured: Measured) -> None:
    assert measured.pairs[4].caption.count("dj") == 2
    assert (measured.values[4]["words_num"], measured.values[4]["text_length"]) == (2, len("hello you"))


def test_a_row_without_an_image_has_no_value_of_one(measured: Measured) -> None:
    found = measured.values[WITHOUT_IMAGE]
    assert {key for key, value in found.items() if value is None} == {
        "image_width", "image_height", "image_text_similarity", "image_text_matching", "watermark",
    }  # fmt: skip


def test_model_values_are_those_of_the_models(measured: Measured, models: dict[str, Path]) -> None:
    """Recomputed with transformers alone."""
    import torch
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageClassification,
        AutoProcessor,
        BlipForImageTextRetrieval,
        CLIPModel,
    )

    clip = CLIPModel.from_pretrained(models["image_text_similarity"]).eval()
    clip_inputs = AutoProcessor.from_pretrained(models["image_text_similarity"])
    blip = BlipForImageTextRetrieval.from_pretrained(models["image_text_matching"]).eval()
    blip_inputs = AutoProcessor.from_pretrained(models["image_text_matching"])
    marks = AutoModelForImageClassification.from_pretrained(models["watermark"]).eval()
    mark_inputs = AutoImageProcessor.from_pretrained(models["watermark"])
    for row in (0, 1, 3, 7):
        pair, found = measured.pairs[row], measured.values[row]
        image = open_image(measured.root, pair.image or "", 50)
        text = {"text": pair.caption.strip(), "images": image, "return_tensors": "pt", "truncation": True}
        with torch.no_grad():
            similarity = clip(**clip_inputs(**text, max_length=12)).logits_per_text / 100
            matching = blip(**blip_inputs(**text, max_length=96)).itm_score.softmax(-1)[0, 1]
            mark = marks(**mark_inputs(image, return_tensors="pt")).logits.softmax(-1)[0, 1]
        assert found["image_text_similarity"] == pytest.approx(float(similarity), abs=1e-5)
        assert found["image_text_matching"] == pytest.approx(float(matching), abs=1e-5)
        assert found["watermark"] == pytest.approx(float(mark), abs=1e-5)
    assert len({row["image_text_similarity"] for row in measured.values}) > 5  # the models do look


def test_nothing_is_written_outside_of_the_work_folder(measured: Measured) -> None:
    """No copies of the data in the user's cache; the settings that see to it are those of the run."""
    settings = yaml.safe_load((measured.work / "measure.yaml").read_text(encoding="utf-8"))
    assert "dataset_path" not in settings and "dataset" not in settings  # tables in memory
    assert not (measured.work / "images").exists()  # unpacked from the tar shard, and gone


def _captions(number: int) -> list[str]:
    """Captions of everything that the definitions treat in a way of its own."""
    draw = random.Random(0)
    odd = sorted(SPECIAL_CHARACTERS - set("\r\n\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029"))
    letters = [
        *"abcABC ",
        *draw.sample(odd, 60),
        " ",
        "\t",
        "\n",
        "\r",
        "\u3000",
        "İ",
        "ß",
        "ﬁ",
        "éa",
        "e\u0301",
        "\x00",
    ]
    words = ["a", "A", "red", "sign.", "--", "24", "«é»", "\u2028", "x\u00a0y"]
    return [
        (" " if draw.random() < 0.5 else "").join(draw.choices(draw.choice([letters, words]), k=draw.randrange(40)))
        for _ in range(number)
    ]


def test_a_broken_image_names_itself_and_costs_one_shard(tmp_path: Path) -> None:
    """Data-Juicer's default drops the batch; Pillow, once it is imported, accepts half a file. Then: resume."""
    root = tmp_path / "images"
    root.mkdir()
    pairs = [Pair(f"row {i}", caption, f"{i % 3}.png") for i, caption in enumerate(_captions(300))]
    pairs[250] = Pair("the one", "a sign", "half.jpg")
    for i in range(3):
        picture(10, 10 + i, seed=i).save(root / f"{i}.png")
    picture(200, 200).save(root / "half.jpg")
    whole = (root / "half.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    rows = write_pairs(tmp_path / "rows.jsonl", pairs)
    operators = simple_operators()
    told: list[tuple[str, int, int]] = []

    def run() -> Any:
        return measure(
            rows, root, operators, work=tmp_path / "work", out=tmp_path, shard_rows=200,
            on_progress=lambda *a: told.append(a),
        )  # fmt: skip

    with pytest.raises(DataError) as error:
        run()
    assert "half.jpg (row the one): OSError: image file is truncated" in str(error.value)
    assert told == [("measure", 0, 300), ("measure", 200, 300)]
    assert not (tmp_path / "values.jsonl").exists()
    (root / "half.jpg").write_bytes(whole)
    told.clear()
    report = run()
    assert (report.rows, report.from_before) == (300, 200)
    assert told == [("measure", 200, 300), ("measure", 300, 300)]
    (tmp_path / "builtin").mkdir()
    measure_builtin(rows, root, operators, out=tmp_path / "builtin")
    assert (tmp_path / "values.jsonl").read_bytes() == (tmp_path / "builtin" / "values.jsonl").read_bytes()


def test_a_missing_package_is_named_and_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found only when Data-Juicer imports it, which is when it would install it."""
    shadow = tmp_path / "shadow"
    (shadow / "ray").mkdir(parents=True)
    (shadow / "ray" / "__init__.py").write_text("raise ImportError('no ray here')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(shadow))
    rows = write_pairs(tmp_path / "rows.jsonl", [Pair("1", "a", None)])
    with pytest.raises(MissingDependencyError) as error:
        measure(rows, tmp_path, [Operator("words_num")], work=tmp_path / "work", out=tmp_path)
    assert "needs the package ray" in str(error.value) and "pip install ray" in str(error.value)


def test_the_recipe_that_is_written_keeps_the_same_rows_in_data_juicers_own_program(
    measured: Measured, tmp_path: Path
) -> None:
    values = {row["id"]: row for row in measured.values}
    ratio = values["2020-01-04"]["character_repetition"]  # a limit that a value hits exactly
    bounds = Limits(
        (
            Bound("words_num", "words_num", "min", 1.5, 1.5),
            Bound("character_repetition", "character_repetition", "max", ratio, ratio),
            Bound("image_shape", "image_height", "min", 14, 14.0),
            Bound("image_shape", "image_width", "max", "p90", 26.0),
        )
    )
    folder = tmp_path / "a recipe's folder"
    folder.mkdir()
    write_recipe(folder, measured.rows, measured.root, simple_operators(), bounds.to_json())
    program = Path(sys.executable).with_name("dj-process")
    done = subprocess.run(
        [program, "--config", "recipe.yaml"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    kept = [json.loads(line)["id"] for line in (folder / "recipe_out" / "kept.jsonl").read_text().splitlines()]
    ours = [pair.id for pair in measured.pairs if pair.image and bounds.judge(values[pair.id]) is None]
    assert kept == ours
    assert "2020-01-04" in kept and 0 < len(kept) < len(measured.pairs)


def test_wrong_settings_are_named_before_data_juicer_is_started(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", [Pair("1", "a", None)])
    words = [Operator("words_num")]
    with pytest.raises(ConfigError, match="executor 'spark'; there are: default, ray"):
        measure(rows, tmp_path, words, work=tmp_path / "w", out=tmp_path, executor="spark")
    with pytest.raises(ModelError, match="nothing is downloaded"):
        model = Operator("image_text_similarity", {"path": "openai/clip-vit-base-patch32"})
        measure(rows, tmp_path, [model], work=tmp_path / "w", out=tmp_path)
    with pytest.raises(ConfigError, match="braces"):
        measure(rows, tmp_path, words, work=tmp_path / "{w}", out=tmp_path)


def test_no_rows_are_no_reason_to_start_it(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", [])
    report = measure(rows, tmp_path, [Operator("words_num")], work=tmp_path / "w", out=tmp_path)
    assert report.rows == 0 and (tmp_path / "values.jsonl").read_bytes() == b""


def test_a_shard_that_lost_its_end_is_done_again(tmp_path: Path) -> None:
    from mgm_exp.data.data_juicer.pairs import plan_shards
    from mgm_exp.data.data_juicer.shards import is_finished, read_shard, write_shard

    rows = write_pairs(tmp_path / "rows.jsonl", [Pair(str(i), "a", None) for i in range(3)])
    (plan,) = plan_shards(rows, 4, {})
    assert not is_finished(tmp_path, plan)
    lines = [{"id": str(i), "words_num": 1} for i in range(3)]
    write_shard(tmp_path, plan, lines)
    assert is_finished(tmp_path, plan) and list(read_shard(tmp_path, plan)) == lines
    content = (tmp_path / plan.name).read_bytes()
    for length in (0, len(content) // 2, len(content) - 1):
        (tmp_path / plan.name).write_bytes(content[:length])
        assert not is_finished(tmp_path, plan)


_RUN = """
import sys
from pathlib import Path
from mgm_exp.data.data_juicer import Operator, measure
folder = Path(sys.argv[1])
measure(folder / "rows.jsonl", folder / "images", [Operator("words_num"), Operator("image_shape")],
        work=folder / "work", out=folder, shard_rows=1, processes=2)
"""


def _workers(folder: Path) -> list[int]:
    """Processes that run in a work folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd") == str(folder / "work"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def _until(is_so: Any, what: str, patience_s: float = 120) -> None:
    end = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_no_process_and_loses_one_shard(number: signal.Signals, tmp_path: Path) -> None:
    root, pairs = make_pairs(tmp_path, 30)
    rows = write_pairs(tmp_path / "rows.jsonl", pairs)
    shards = tmp_path / "work" / "shards"
    run = subprocess.Popen([sys.executable, "-c", _RUN, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        _until(lambda: shards.is_dir() and any(shards.iterdir()), "the first shard")
        assert _workers(tmp_path)
        run.send_signal(number)
        assert run.wait(60) != 0
        _until(lambda: not _workers(tmp_path), "the end of the worker", 30)
    finally:
        run.kill()
    assert not (tmp_path / "values.jsonl").exists()
    finished = len(list(shards.glob("*.jsonl")))
    operators = [Operator("words_num"), Operator("image_shape")]
    report = measure(rows, root, operators, work=tmp_path / "work", out=tmp_path, shard_rows=1)
    assert 0 < report.from_before == finished < len(pairs)
    (tmp_path / "builtin").mkdir()
    measure_builtin(rows, root, operators, out=tmp_path / "builtin")
    assert (tmp_path / "values.jsonl").read_bytes() == (tmp_path / "builtin" / "values.jsonl").read_bytes()


@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_has_the_same_guards(measured: Measured, tmp_path: Path) -> None:
    report = measure(
        measured.rows, measured.root, measured.operators, work=tmp_path / "work", out=tmp_path, executor="ray"
    )
    assert report.executor == "ray"
    assert (tmp_path / "values.jsonl").read_bytes() == measured.content
    root, pairs = make_pairs(tmp_path / "broken", 2)
    picture(200, 200).save(root / "1.png")
    (root / "1.png").write_bytes((root / "1.png").read_bytes()[:5000])
    rows = write_pairs(tmp_path / "rows.jsonl", pairs)
    with pytest.raises(DataError, match=r"1\.png \(row 2020-01-02\)"):
        measure(rows, root, [Operator("image_shape")], work=tmp_path / "w2", out=tmp_path, executor="ray")
