"""A whole exploration, its numbers recomputed from the file, and what it leaves in its folder."""

from __future__ import annotations

import json
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from mgm_exp.cli import main
from mgm_exp.data.exploration import Options, explore
from mgm_exp.data.exploration.advice import recipe_advice
from mgm_exp.data.exploration.blocks import sentences
from mgm_exp.data.exploration.findings import findings_of
from mgm_exp.data.exploration.plots import draw
from mgm_exp.data.formats import find_source
from tests.data_room.conftest import chat, pair, picture, write_lines

HOSTILE = "<script>alert(1)</script> $x^2$ & \u202e | `rm` *x* [a](b) \x01"


def dataset(folder: Path, number: int = 120) -> list[str]:
    """Pairs of all kinds of lengths, some damage, hostile text; returns the captions that can be used."""
    rng = random.Random(3)
    words = "a red round sign above the old label with price $5 and one more word".split()
    captions = [" ".join(rng.choices(words, k=rng.randint(1, 14))) for _ in range(number)]
    captions[5] = captions[6] = captions[7] = "for sale"
    captions[8] = HOSTILE
    captions[9] = "ein Schild mit der Aufschrift und dem Preis"
    (folder / "images").mkdir(parents=True)
    rows: list[Any] = []
    for place, caption in enumerate(captions):
        name = f"images/{place}.png"
        if place == 3:
            (folder / name).write_bytes(b"\x89PNG broken")
        elif place == 4:
            pass  # missing
        elif place == 11:
            Image.new("RGB", (20, 14), "white").save(folder / name)
        elif place == 13:
            (folder / name).write_bytes((folder / "images/12.png").read_bytes())
        else:
            picture(40 + place % 9, 30, seed=place).save(folder / name)
        rows.append(pair(f"r{place}", name, caption))
    write_lines(folder / "pairs.jsonl", [*rows[:20], "{broken", *rows[20:], pair("r0", "images/0.png", "again r0")])
    return captions


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that the command leaves, and the captions."""
    folder = tmp_path_factory.mktemp("explored")
    captions = dataset(folder / "data")
    code = main(["explore", str(folder / "data"), "--out", str(folder / "out"), "--workers", "1"])
    assert code == 0
    return folder / "out", captions


def test_numbers_are_those_of_the_file(explored: tuple[Path, list[str]]) -> None:
    out, captions = explored
    found = json.loads((out / "explore.json").read_text(encoding="utf-8"))
    text, images = found["text"], found["images"]
    words = [caption.split() for caption in captions]
    tokens = [word for caption in words for word in caption]
    assert (found["rows"], found["usable_rows"]) == (122, 120)
    assert found["bad_rows"] == {"not_json": 1, "duplicate_id": 1}
    assert text["words_mean"] == pytest.approx(statistics.fmean(map(len, words)))
    assert text["words_median"] == statistics.median(map(len, words))
    assert text["words_std"] == pytest.approx(statistics.pstdev(map(len, words)))
    assert text["characters_mean"] == pytest.approx(statistics.fmean(map(len, captions)))
    assert text["too_short_share"] == pytest.approx(sum(len(caption) < 4 for caption in words) / 120)
    assert (text["tokens"], text["vocabulary"]) == (len(tokens), len(set(tokens)))
    windows = [len(set(tokens[start : start + 50])) / 50 for start in range(len(tokens) - 49)]
    assert text["mattr_50"] == pytest.approx(statistics.fmean(windows))
    assert text["distinct_1"] == pytest.approx(len(set(tokens)) / len(tokens))
    assert text["duplicate_share"] == pytest.approx(1 - len(set(captions)) / 120)
    assert text["duplicates"]["largest"][0] == {"captions": 3, "text": "for sale"}
    top = Counter(word.lower() for word in tokens).most_common(1)[0]
    assert text["top_words"][0]["count"] == top[1]
    assert (images["count"], images["missing"], images["broken"]) == (120, 1, 1)
    assert images["formats"] == {"PNG": 118} and images["modes"] == {"RGB": 118}
    assert images["identical_groups"] == images["duplicate_groups"] == 1 and images["blank"] == 1
    assert text["token_lengths"]["model_max_length"] == 512 and text["token_lengths"]["max"] > 5
    assert text["languages"]["German"] == pytest.approx(1 / 120)


def test_the_report_is_one_harmless_file(explored: tuple[Path, list[str]]) -> None:
    html = (explored[0] / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html
    assert html.count("<script>") == 1
    assert re.findall(r'(?:src|href)="(?!#|data:image/)[^"]*"', html) == []
    assert "\x01" not in html and "\u202e" not in html
    assert html.count("<svg") == html.count("<figure>") == len(list((explored[0] / "plots").iterdir()))
    ids = re.findall(r'\sid="([^"]+)"', html)
    repeated = {name for name, count in Counter(ids).items() if count > 1}
    # matplotlib names groups alike in every drawing; nothing refers to those. What is referred to is there once.
    assert repeated.isdisjoint(re.findall(r'(?:href="#|url\(#)([^")]+)', html))


def test_the_plots_are_pictures(explored: tuple[Path, list[str]]) -> None:
    for path in (explored[0] / "plots").iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and image.size[0] > 600


def test_the_summary_says_it_in_words(explored: tuple[Path, list[str]]) -> None:
    text = (explored[0] / "summary.md").read_text(encoding="utf-8")
    found = json.loads((explored[0] / "explore.json").read_text(encoding="utf-8"))
    for finding in found["findings"]:
        assert finding["sentence"].split(":")[0].split("(")[0].split("“")[0].strip() in text.replace("\\", "")
    assert "cannot be read as a row" in text and "have fewer than 4 words" in text
    assert "data.recipe.words_num" in text
    assert "<script>" not in text.replace("\\<", "")


def test_the_same_data_gives_the_same_result(explored: tuple[Path, list[str]], tmp_path: Path) -> None:
    data = explored[0].parent / "data"
    again = explore(find_source(data), Options(workers=2, tokenizer=None)).content
    first = json.loads((explored[0] / "explore.json").read_text(encoding="utf-8"))
    for content in (again, first):
        content["text"].pop("token_lengths")
        content.pop("seconds")
    assert json.loads(json.dumps(again)) == {key: first[key] for key in again}


def test_advice_drops_what_it_says(explored: tuple[Path, list[str]]) -> None:
    exploration = explore(find_source(explored[0].parent / "data"), Options(workers=1))
    values = exploration.values.table
    columns = {
        "words_num": values.words,
        "word_repetition": values.word_repetition[2],
        "character_repetition": values.character_repetition[5],
    }
    advice = {item.key: item for item in recipe_advice(exploration)}
    assert "data.recipe.words_num.min" in advice
    checked = 0
    for key, item in advice.items():
        _, _, operator, side = key.split(".")
        if operator in columns:
            column = columns[operator]
            is_dropped = column < item.value if side == "min" else column > item.value
            assert item.dropped == pytest.approx(is_dropped.mean()) and 0 < item.dropped < 1
            checked += 1
    assert checked >= 2


def test_a_sample_is_drawn_once_and_said(explored: tuple[Path, list[str]]) -> None:
    location = find_source(explored[0].parent / "data")
    one = explore(location, Options(workers=1, sample=30, seed=1))
    two = explore(location, Options(workers=1, sample=30, seed=1))
    other = explore(location, Options(workers=1, sample=30, seed=2))

    def ids(exploration: Any) -> list[str]:
        return [exploration.rows.ids[place] for place in range(len(exploration.rows))]

    assert one.content["sample"] == {"rows": 30, "of": 122, "seed": 1}
    assert ids(one) == ids(two) != ids(other)
    assert ids(one) == sorted(ids(one), key=lambda name: int(name[1:]))
    assert any("sample of 30 of 122" in finding.sentence for finding in findings_of(one.content))


def test_answers_of_conversations_are_captions(tmp_path: Path) -> None:
    rows = [chat("1", None, "what?", "a red sign", "and below?", "a label"), chat("2", None, "what?", "nothing")]
    exploration = explore(find_source(write_lines(tmp_path / "rows.jsonl", rows)), Options(workers=1))
    assert exploration.content["text"]["captions"] == 3 and exploration.content["usable_rows"] == 2
    assert [exploration.caption(place) for place in range(3)] == ["a red sign", "a label", "nothing"]
    assert [exploration.row_of(place) for place in range(3)] == [0, 0, 1]
    assert exploration.content["images"] is None


@pytest.mark.parametrize("rows", [[pair("1", "gone.png", "one")], [chat("1", None, "what?", "x")]])
def test_tiny_data_has_a_report_too(tmp_path: Path, rows: list[Any]) -> None:
    write_lines(tmp_path / "rows.jsonl", rows)
    assert main(["explore", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_data_without_a_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("{broken\n[1]\n", encoding="utf-8")
    assert main(["explore", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no row that can be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "rows.jsonl", [pair("1", "a.png")])
    assert main(["explore", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path)]) == 2
    assert "hold" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["a", "b", "c"], "3 paths"),
        (["rows.jsonl", "--images", "x", "--images", "y"], "2 times"),
        (["rows.jsonl", "--tokenizer", "."], "no tokenizer.json"),
        (["rows.jsonl", "--clip", "."], "config.json"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl", [pair("1", "a.png")])
    assert main(["explore", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("a sign", 1), ("A sign.", 1), ("One. Two", 2), ("Really?! Yes…", 2), ("v1.2 costs 3.50 today", 1)],
)
def test_sentences_end_with_a_mark_before_white_space(text: str, count: int) -> None:
    assert sentences(text) == count


def test_labels_of_plots_are_text_and_never_formulas() -> None:
    plot = draw("x", "x", "x", lambda axes: axes.set_title("$\\frac{1}{2}$ <b> & \x01".replace("\x01", "")))
    texts = [element.text for element in ElementTree.fromstring(plot.svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "$\\frac{1}{2}$ <b> &" in [(text or "").strip() for text in texts]
