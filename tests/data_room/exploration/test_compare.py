"""Two datasets: what is compared, what is refused, and what is matched."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from mgm_exp.cli import main
from mgm_exp.data.exploration import Comparison, Options, compare_explorations, explore
from mgm_exp.data.exploration.compare import Difference
from mgm_exp.data.exploration.comparison_report import comparison_findings
from mgm_exp.data.formats import find_source
from tests.data_room.conftest import pair, picture, write_lines


def captions(number: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = [f"w{place}" for place in range(600)]
    return [" ".join(rng.choices(words[: rng.choice((30, 600))], k=rng.randint(3, 12))) for _ in range(number)]


def compared(folder: Path, a: dict[str, str], b: dict[str, str]) -> Comparison:
    explorations = []
    for name, given in (("a", a), ("b", b)):
        rows = [pair(row_id, f"{row_id}.png", caption) for row_id, caption in given.items()]
        path = write_lines(folder / f"{name}.jsonl", rows)
        explorations.append(explore(find_source(path), Options(workers=1, with_images=False)))
    return compare_explorations(*explorations)


def named(comparison: Comparison, name: str, is_paired: bool = False) -> Difference:
    return next(item for item in comparison.differences if (item.name, item.is_paired) == (name, is_paired))


def test_a_subset_is_as_varied_as_the_whole_and_the_plain_ratio_is_refused(tmp_path: Path) -> None:
    """The subset's plain ratio is far higher, which says nothing; the comparable measures see no difference."""
    whole = {f"r{place}": caption for place, caption in enumerate(captions(3000, seed=1))}
    subset = dict(list(whole.items())[:400])
    comparison = compared(tmp_path, subset, whole)
    plain = named(comparison, "distinct words / all words")
    assert plain.a is not None and plain.b is not None and plain.a > 3 * plain.b
    assert plain.difference is None and "depends on size" in plain.refused
    assert not named(comparison, "MATTR-50").is_clear
    ttr = named(comparison, "TTR at 1,000 words")
    assert not ttr.is_clear and (ttr.n_a, ttr.n_b) == (1000, 1000)
    sentences = " ".join(finding.sentence for finding in comparison_findings(comparison))
    assert "times as varied" in sentences and "about equally varied" in sentences
    assert "400 rows have the same id in both, and the same caption" in sentences


def test_no_interval_of_a_share_reaches_beyond_what_a_difference_can_be(tmp_path: Path) -> None:
    """All captions of A are short and few of B's are: the plain interval would end beyond 100 %."""
    a = {f"{number}": "two words" for number in range(6)}
    b = {f"{number}": "two words" if number == 0 else "five words are in here" for number in range(6)}
    comparison = compared(tmp_path, a, b)
    short = named(comparison, "fewer than 4 words")
    assert short.difference == pytest.approx(-5 / 6) and short.ci_low == -1.0
    assert all(
        abs(end) <= 1
        for item in comparison.differences
        if item.name[:4] in ("TTR ", "MATT", "fewe")
        for end in (item.ci_low, item.ci_high)
        if end is not None
    )


def test_equal_sizes_may_be_compared_by_the_plain_ratio(tmp_path: Path) -> None:
    a = {"1": "a b c d", "2": "e f g h"}
    b = {"1": "a b a b", "2": "a b a b"}
    plain = named(compared(tmp_path, a, b), "distinct words / all words")
    assert not plain.refused and plain.difference == pytest.approx(2 / 8 - 1)


def test_matched_rows_are_compared_caption_by_caption(tmp_path: Path) -> None:
    before = {f"r{place}": caption for place, caption in enumerate(captions(200, seed=2))}
    after = {name: f"{caption} and one more" for name, caption in before.items()}
    after["only in b"] = "something else"
    comparison = compared(tmp_path, before, dict(reversed(list(after.items()))))
    words = named(comparison, "words", is_paired=True)
    # Every caption gained three words: the matched difference is certain, that of the means is not.
    assert words.difference == pytest.approx(3) and words.ci_low == pytest.approx(3) == words.ci_high
    apart = named(comparison, "words")
    assert apart.ci_low is not None and apart.ci_high is not None and apart.ci_high - apart.ci_low > 0.5
    assert comparison.content["comparison"]["paired"] == {"captions": 200, "changed": 200}
    assert [comparison.a.caption(place) for place in comparison.matched_a.tolist()] == list(before.values())
    assert [comparison.b.caption(place) for place in comparison.matched_b.tolist()] == [after[name] for name in before]


def test_means_have_the_interval_of_two_samples(tmp_path: Path) -> None:
    a = {f"a{place}": caption for place, caption in enumerate(captions(150, seed=3))}
    b = {f"b{place}": f"{caption} x" for place, caption in enumerate(captions(90, seed=4))}
    found = named(compared(tmp_path, a, b), "words")
    x, y = ([len(caption.split()) for caption in given.values()] for given in (a, b))
    error = (statistics.pvariance(x) / 150 + statistics.pvariance(y) / 90) ** 0.5
    assert found.difference == pytest.approx(statistics.fmean(y) - statistics.fmean(x))
    assert found.ci_low == pytest.approx(found.difference - 1.959964 * error)


def test_words_that_tell_them_apart_come_first(tmp_path: Path) -> None:
    a = {str(place): f"common word raw {place}" for place in range(50)}
    b = {str(place): f"common word new {place}" for place in range(50)}
    words = compared(tmp_path, a, b).content["comparison"]["words"]
    assert words["more_in_a"][0]["word"] == "raw" and words["more_in_b"][0]["word"] == "new"


def test_the_command_writes_a_report_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, extra in (("a", ""), ("b", " <b>new</b>")):
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for place, caption in enumerate(captions(40, seed=5)):
            picture(seed=place).save(folder / f"{place}.png")
            rows.append(pair(f"r{place}", f"{place}.png", caption + extra))
        write_lines(folder / "rows.jsonl", rows)
    code = main(["explore", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert code == 0
    assert "Captions are longer in B" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "explore.json").read_text(encoding="utf-8"))
    assert found["a"]["rows"] == found["b"]["rows"] == 40
    assert found["comparison"]["images"] == {"in_both": 40, "only_in_a": 0, "only_in_b": 0}
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Before and after" in html and "&lt;b&gt;new" in html and "<b>new" not in html
    assert "Captions are longer in B" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
