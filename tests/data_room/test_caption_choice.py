"""Policies of recaptioning: which caption a row ends up with, which rows are added, and the fate of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mgm_exp.config import CaptionerConfig, CaptionPolicy, ScorerConfig
from mgm_exp.data import Row, read_rows, recaption
from mgm_exp.data.caption_choice import CaptionChoice, Said
from mgm_exp.errors import ConfigError, MgmError

from .conftest import chat, lines_of, pair, write_lines


class Sizes:
    """A captioner that sees the size of a picture; its sampled captions tell their seed."""

    name, can_answer = "sizes", True

    def caption(self, images: list[Image.Image], *, seeds: Sequence[int] | None = None) -> list[str]:
        size = [f"{image.width} by {image.height}" for image in images]
        return size if seeds is None else [f"{text} seed {seed % 2}" for text, seed in zip(size, seeds, strict=True)]

    def answer(self, images: list[Image.Image], questions: Sequence[str]) -> list[str]:
        answers = {"how wide?": "{0.width}", "why?": ""}
        return [answers[question].format(image) for question, image in zip(questions, images, strict=True)]


class Words:
    """A judge that likes words: a tenth for each."""

    def __init__(self) -> None:
        self.shown: list[list[str]] = []

    def score(self, images: list[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        self.shown += [list(of_image) for of_image in texts]
        return [[len(text.split()) / 10 for text in of_image] for of_image in texts]


@pytest.fixture
def source(tmp_path: Path, root: Path) -> Path:
    (root / "3.png").write_bytes(b"")
    rows = [
        pair("short", "0.png", "a sign"),
        pair("long", "1.png", "a very long caption of nothing"),
        pair("none", "2.png", ""),
        pair("broken", "3.png", "raw"),
        chat("text", None, "q", "a"),
        chat("asked", "4.png", "<image>\nwhat?", "yes"),
        "{",
    ]
    return write_lines(tmp_path / "raw.jsonl", rows)


Result = tuple[dict[str, Any], dict[str, Row], list[dict[str, Any]]]


def run(tmp_path: Path, root: Path, source: Path, choice: CaptionChoice, **more: Any) -> Result:
    """The report, the rows that were written, and all fates."""
    work = tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
    (work / "out").mkdir(parents=True)
    report = recaption(
        read_rows(source), more.pop("captioner", Sizes()), image_root=root, work=work, out=work / "out", choice=choice,
        batch_size=2, **more,
    )  # fmt: skip
    rows = [row for row in read_rows(work / "out" / "captions.jsonl") if isinstance(row, Row)]
    assert len(rows) == len(lines_of(work / "out" / "captions.jsonl")) == len({row.id for row in rows})
    return report.to_json(), {row.id: row for row in rows}, lines_of(work / "out" / "fates.jsonl")


def fates(lines: list[dict[str, Any]]) -> dict[str | None, str]:
    assert {line["step"] for line in lines} == {"recaption"}
    return {line["id"]: line["fate"] for line in lines}


def detail(lines: list[dict[str, Any]], row_id: str | None) -> dict[str, Any]:
    (found,) = [line["detail"] for line in lines if line["id"] == row_id]
    return found


def caption(row: Row) -> str | None:
    return row.caption if row.conversations is None else row.conversations[-1].text


def test_every_row_has_a_fate(tmp_path: Path, root: Path, source: Path) -> None:
    report, rows, lines = run(tmp_path, root, source, CaptionChoice())
    assert fates(lines) == {
        "short": "changed", "long": "changed", "none": "changed", "asked": "changed",
        "broken": "dropped", "text": "kept", None: "dropped",
    }  # fmt: skip
    assert detail(lines, "broken")["kind"] == "zero_bytes" and detail(lines, None) == {
        "kind": "not_json", "detail": detail(lines, None)["detail"], "line": 7,
    }  # fmt: skip
    assert {caption(rows[name]) for name in ("short", "long", "none", "asked")} == {"20 by 14"}
    assert [rows[name].raw_caption for name in ("short", "none", "asked")] == ["a sign", "", "yes"]
    assert report["rows"] == 7 and report["recaptioned"] == 4 and report["added"] == 0


def test_keys_that_are_not_ours_stay_with_the_row(tmp_path: Path, root: Path) -> None:
    rows = [{**pair("a", "0.png"), "licence": "cc0"}, {**chat("b", "1.png", "q", "a", "q", "a"), "tags": ["x", 1]}]
    _, found, _ = run(tmp_path, root, write_lines(tmp_path / "more.jsonl", rows), CaptionChoice())
    assert found["a"].extra == {"licence": "cc0"} and found["b"].extra == {"tags": ["x", 1]}


def test_the_better_caption_is_kept_and_both_scores_are_told(tmp_path: Path, root: Path, source: Path) -> None:
    judge = Words()
    report, rows, lines = run(tmp_path, root, source, CaptionChoice("keep_if_better"), scorer=judge)
    assert caption(rows["short"]) == "20 by 14" and rows["short"].raw_caption == "a sign"
    assert detail(lines, "short") == {"score_raw": 0.2, "score_new": 0.3}
    assert caption(rows["long"]) == "a very long caption of nothing" and rows["long"].raw_caption is None
    assert detail(lines, "long") == {
        "why": "not better", "caption": "20 by 14", "score_raw": 0.6, "score_new": 0.3,
    }  # fmt: skip
    # A row without a caption takes any.
    assert caption(rows["none"]) == "20 by 14" and detail(lines, "none") == {"score_raw": None, "score_new": 0.3}
    assert judge.shown == [["a sign", "20 by 14"], ["a very long caption of nothing", "20 by 14"], ["20 by 14"],
                           ["yes", "20 by 14"]]  # fmt: skip
    assert {key: report[key] for key in ("recaptioned", "kept_raw", "unchanged", "rejected")} == {
        "recaptioned": 3, "kept_raw": 1, "unchanged": 1, "rejected": 2,
    }  # fmt: skip
    assert report["why_kept"] == {"not better": 1}


@pytest.mark.parametrize(("margin", "replaced"), [(-0.4, 4), (0.0, 3), (0.1, 2), (0.2, 1)])
def test_the_margin_must_be_exceeded(tmp_path: Path, root: Path, source: Path, margin: float, replaced: int) -> None:
    # Words: short 2, long 6, none -, asked 1; new 3
    report, _, _ = run(tmp_path, root, source, CaptionChoice("keep_if_better", margin=margin), scorer=Words())
    assert report["recaptioned"] == replaced and report["kept_raw"] == 4 - replaced


def test_mix_asks_for_a_share_of_the_rows(tmp_path: Path, root: Path) -> None:
    source = write_lines(tmp_path / "many.jsonl", [pair(f"r{i}", f"{i % 3}.png", f"raw {i}") for i in range(400)])
    asked: list[int] = []

    class Counted(Sizes):
        def caption(self, images: list[Image.Image], *, seeds: Sequence[int] | None = None) -> list[str]:
            asked.append(len(images))
            return super().caption(images, seeds=seeds)

    report, rows, lines = run(tmp_path, root, source, CaptionChoice("mix", mix_share=0.3), captioner=Counted())
    assert 90 <= report["recaptioned"] <= 150 and report["recaptioned"] + report["kept_raw"] == 400
    assert sum(asked) == report["recaptioned"]
    for name, fate in fates(lines).items():
        row = rows[str(name)]
        assert (row.raw_caption is not None) == (fate == "changed")
        assert caption(row) == ("20 by 14" if fate == "changed" else f"raw {str(name)[1:]}")
    _, _, again = run(tmp_path, root, source, CaptionChoice("mix", mix_share=0.3, seed=1))
    assert fates(again) != fates(lines)
    none, _, _ = run(tmp_path, root, source, CaptionChoice("mix", mix_share=0.0))
    every, _, _ = run(tmp_path, root, source, CaptionChoice("mix", mix_share=1.0))
    assert none["kept_raw"] == every["recaptioned"] == 400


@given(st.text(max_size=8), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_adds_rows(row_id: str, seed: int, a: float, b: float) -> None:
    small, large = sorted((a, b))
    chosen = [CaptionChoice("mix", mix_share=share, seed=seed).wants_captions(row_id) for share in (small, large)]
    assert chosen[1] or not chosen[0]


@given(st.text(max_size=8), st.text(max_size=8), st.integers(2, 5), st.integers(2, 5), st.integers(0, 9))
def test_every_sampled_caption_has_a_seed_of_its_own(a: str, b: str, i: int, j: int, seed: int) -> None:
    choice = CaptionChoice(seed=seed)
    assert 0 <= choice.seed_of(a, i) < 2**63
    assert (choice.seed_of(a, i) == choice.seed_of(b, j)) == ((a, i) == (b, j))
    assert choice.seed_of(a, i) != CaptionChoice(seed=seed + 1).seed_of(a, i)


def test_further_captions_become_rows_unless_they_say_the_same(tmp_path: Path, root: Path, source: Path) -> None:
    choice = CaptionChoice(captions_per_image=4)
    report, rows, lines = run(tmp_path, root, source, choice)
    expected = {}
    for name in ("short", "long", "none", "asked"):
        said = {}
        for number in (2, 3, 4):
            said.setdefault(f"20 by 14 seed {choice.seed_of(name, number) % 2}", f"{name}#c{number}")
        expected |= {row_id: text for text, row_id in said.items()}
    added = {row_id: caption(row) for row_id, row in rows.items() if "#" in row_id}
    assert added == expected
    assert report["added"] == len(expected) and report["not_added"] == 12 - len(expected)
    assert {row_id for row_id, fate in fates(lines).items() if fate == "added"} == set(expected)
    assert all(rows[row_id].raw_caption == rows[row_id.split("#")[0]].raw_caption for row_id in expected)
    assert all(rows[row_id].image == rows[row_id.split("#")[0]].image for row_id in expected)
    order = list(rows)
    assert all(order.index(row_id) > order.index(row_id.split("#")[0]) for row_id in expected)
    assert [name for name in order if "#" not in name] == ["short", "long", "none", "text", "asked"]


def test_further_captions_are_judged_too(tmp_path: Path, root: Path, source: Path) -> None:
    choice = CaptionChoice("keep_if_better", captions_per_image=2, margin=0.15)
    _, rows, lines = run(tmp_path, root, source, choice, scorer=Words())
    # short: 0.2 -> 0.3 is not enough, the sampled caption's 0.5 is; long: 0.6 beats both
    assert fates(lines)["short"] == "kept" and caption(rows["short"]) == "a sign"
    assert detail(lines, "short#c2") == {"of": "short", "score_raw": 0.2, "score_new": 0.5}
    assert rows["short#c2"].raw_caption == "a sign" and "long#c2" not in rows


def test_answers_become_rows_and_questions_go_to_every_image(tmp_path: Path, root: Path, source: Path) -> None:
    choice = CaptionChoice("mix", mix_share=0.0, questions=("how wide?", "why?"))
    report, rows, lines = run(tmp_path, root, source, choice)
    assert fates(lines)["short#q1"] == "added" and detail(lines, "short#q1") == {"of": "short"}
    asked = rows["asked#q1"].conversations
    assert asked is not None and [turn.text for turn in asked] == ["<image>\nhow wide?", "20"]
    assert rows["short#q1"].raw_caption is None and rows["short#q1"].image == "0.png"
    assert {name for name in rows if "#" in name} == {"short#q1", "long#q1", "none#q1", "asked#q1"}
    assert report["added"] == 4 and report["not_added"] == 4 and report["kept_raw"] == 4
    assert caption(rows["short"]) == "a sign"


@pytest.mark.parametrize("policy", ["replace", "keep_if_better", "mix"])
def test_a_captioner_without_words_costs_a_row_only_where_captions_are_replaced(
    tmp_path: Path, root: Path, source: Path, policy: str
) -> None:
    class Mute(Sizes):
        def caption(self, images: list[Image.Image], *, seeds: Sequence[int] | None = None) -> list[str]:
            return ["<image> \n"] * len(images)

    choice = CaptionChoice(policy, mix_share=1.0)
    report, rows, lines = run(tmp_path, root, source, choice, captioner=Mute(), scorer=Words())
    if policy == "replace":
        assert report["rejected"] == 6 and detail(lines, "short")["kind"] == "image_token_in_answer"
    else:
        assert (
            report["kept_raw"] == 4
            and report["why_kept"] == {"image_token_in_answer": 4}
            and caption(rows["short"]) == "a sign"
        )
        assert detail(lines, "short")["why"] == "image_token_in_answer"


class Files:
    """A captioner that opens files itself."""

    name, can_answer = "files", False

    def __init__(self) -> None:
        self.works: list[Path] = []

    def caption_files(
        self, rows: Sequence[Row], *, image_root: Path, work: Path, max_megapixels: float
    ) -> Iterator[dict[str, Any]]:
        self.works.append(work)
        for row in rows:
            if (image_root / str(row.image)).stat().st_size:
                yield {"id": row.id, "caption": f"file {row.image}"}
            else:
                yield {"id": row.id, "kind": "zero_bytes", "detail": "empty"}


@pytest.mark.parametrize("policy", ["replace", "keep_if_better", "mix"])
def test_a_captioner_of_files_takes_the_same_way(tmp_path: Path, root: Path, source: Path, policy: str) -> None:
    choice = CaptionChoice(policy, mix_share=0.5, seed=1)
    files = Files()
    report, rows, lines = run(tmp_path, root, source, choice, captioner=files, scorer=Words())
    replaced = [name for name, fate in fates(lines).items() if fate == "changed"]
    wanted = [name for name in ("short", "long", "none", "asked") if choice.wants_captions(name)]
    assert replaced == {"keep_if_better": ["none", "asked"]}.get(policy, wanted)
    assert all(caption(rows[str(name)]) == f"file {rows[str(name)].image}" for name in replaced)
    assert (fates(lines)["broken"] == "dropped") == choice.wants_captions("broken")
    assert report["recaptioned"] == len(replaced) and len(files.works) == 1
    if policy == "keep_if_better":
        assert detail(lines, "long")["score_new"] == 0.2


def test_what_the_parts_cannot_do_is_said_before_anything_is_asked(tmp_path: Path, root: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match=r"scorer\.path is not given"):
        run(tmp_path, root, source, CaptionChoice("keep_if_better"))
    with pytest.raises(ConfigError, match="questions holds 1 questions, but files only describes"):
        run(tmp_path, root, source, CaptionChoice(questions=("why?",)), captioner=Files())
    with pytest.raises(ConfigError, match="captions_per_image=2, but files writes one"):
        run(tmp_path, root, source, CaptionChoice(captions_per_image=2), captioner=Files())

    class Lost(Sizes):
        def answer(self, images: list[Image.Image], questions: Sequence[str]) -> list[str]:
            return []

    with pytest.raises(MgmError, match="0 answers for 2 images"):
        run(tmp_path, root, source, CaptionChoice(questions=("why?",)), captioner=Lost())


def test_the_section_describes_the_choice() -> None:
    section = CaptionerConfig(
        policy=CaptionPolicy.mix, mix_share=0.2, scorer=ScorerConfig(margin=0.1), captions_per_image=3,
        questions=["q"], seed=4,
    )  # fmt: skip
    assert CaptionChoice.of_section(section) == CaptionChoice("mix", 0.2, 0.1, 3, ("q",), 4)
    assert CaptionChoice.of_section(CaptionerConfig()) == CaptionChoice()


TEXTS = st.lists(st.text(max_size=5), max_size=3).map(tuple)


@given(
    st.builds(
        Said, st.text(max_size=5), TEXTS, TEXTS, st.none() | st.floats(-1, 1),
        st.lists(st.none() | st.floats(-1, 1), max_size=3).map(tuple),
    )
)  # fmt: skip
def test_what_was_said_survives_the_file(said: Said) -> None:
    assert Said.from_json(said.to_json()) == said
