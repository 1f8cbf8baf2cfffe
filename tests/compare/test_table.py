"""The comparison for people: words, tables at every width, Markdown, SVG."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from run_folders import config, write_run, write_sweep

from mgm_exp.compare import compare, markdown, print_comparison, write_markdown, write_svg
from mgm_exp.compare import comparison as room
from mgm_exp.compare.wording import count, notes, signed, verdict_lines


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(room, "RESAMPLES", 1000)


@pytest.fixture
def comparison(demo_sweep):
    return compare([demo_sweep])


def printed(comparison, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_comparison(comparison, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_verdict_is_a_sentence(comparison):
    tied, better = verdict_lines(comparison)
    assert re.fullmatch(
        r"lora_r16 and lora_r8 are statistically tied on demo: [+-]\d\.\d points, 95 % interval -\d\.\d to \+\d\.\d, "
        r"adjusted p = 0\.\d+, n=600",
        tied,
    )
    assert better.startswith("full is better than lora_r8 on demo: +2")
    assert re.search(r"adjusted p = 0\.00\d, n=600$", better)


@pytest.mark.parametrize("width", [100, 110, 120])
def test_wide_terminals_show_a_run_on_one_line(comparison, width):
    lines = printed(comparison, width)
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if re.match(r"2 +full ", line))
    for part in (r"\[\d\d\.\d, \d\d\.\d\]", r"\+2\d\.\d \[.*\] better", "782.2 k", "5,210", "0.87", "completed"):
        assert re.search(part, row)


@pytest.mark.parametrize("width", [30, 60, 80, 99])
def test_narrow_terminals_lose_nothing(comparison, width):
    lines = printed(comparison, width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for part in ("lora_r16", "tied", "better", "782.2 k", "5,210", "0.87", "completed", "failed", "question only"):
        assert part in text


def test_into_a_pipe_a_run_is_printed_on_one_line(comparison, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_comparison(comparison)
    assert re.search(r"^1 +lora_r16 .* tied .* completed$", capsys.readouterr().out, re.MULTILINE)


def test_baselines_failures_and_limits_are_told(comparison):
    text = "\n".join(printed(comparison, 200))
    assert re.search(r"question only +21\.0 \[", text) and re.search(r"untouched base +0\.0 \[0\.0, 0\.6\]", text)
    assert "full lr=9 failed: the loss is not finite at step 12. Give a lower train.lr." in text
    assert "train.lr (0.005, 0.0015) changes together with adapter.name" in text
    assert re.search(r"a true difference of \d\.\d points on demo is found with probability 80%", text)
    assert "another seed may train another model" in text


def test_many_runs_are_summed_up_in_one_sentence(tmp_path):
    for number in range(6):
        scores = [1.0] * (100 + 20 * (number == 4)) + [0.0] * (100 - 20 * (number == 4))
        write_run(tmp_path / str(number), scores, settings=config(seed=number))
    write_sweep(tmp_path, [{"number": k, "params": {"seed": k}} for k in range(6)])
    line, best = verdict_lines(compare(tmp_path))
    assert best == "On demo, seed=4 is the highest, and every other one is told apart from it"
    assert line == (
        "On demo, 5 runs against seed=0: 1 better, 4 statistically tied, 0 worse; highest: seed=4, "
        + line.split("seed=4, ")[1]
    )
    assert re.search(r"\+10\.0 \[\+\d+\.\d, \+\d+\.\d\] points \(better\)$", line)


def test_two_benchmarks_have_a_table_each_and_costs_are_shown_once(tmp_path):
    folders = [
        write_run(tmp_path / name, {"demo": [1.0, 0.0], "textvqa": [0.3, 0.0, 1.0]}, settings=config(adapter))
        for name, adapter in (("a", "lora_r8"), ("b", "lora_r16"))
    ]
    lines = printed(compare(folders), 120)
    assert "demo" in lines and "textvqa" in lines
    assert sum("completed" in line for line in lines) == 2


def test_questions_that_share_images_are_pointed_out(tmp_path):
    images = [k // 10 for k in range(100)]
    folders = [
        write_run(tmp_path / n, [1.0] * (50 + 2 * (n == "b")) + [0.0] * (50 - 2 * (n == "b")), images=images)
        for n in "ab"
    ]
    text = notes(compare(folders))
    assert "demo: 100 questions about 10 images; those about one image count as dependent" in text
    assert "demo: fewer than 30 images, so its intervals are too narrow" in text


def test_nothing_to_compare_is_said_in_words(tmp_path):
    one = write_run(tmp_path / "one", [1.0, 0.0])
    assert verdict_lines(compare([one])) == ["Only lora_r8 is completed: there is nothing to compare it with yet."]
    failed = write_run(tmp_path / "two", status="interrupted", error={"cause": "SIGTERM"})
    comparison = compare([failed])
    assert verdict_lines(comparison) == ["None of 1 runs is completed: there is no result to compare yet."]
    assert notes(comparison)[0] == "lora_r8 was interrupted: SIGTERM"
    assert any(line.endswith("interrupted") for line in printed(comparison, 120))


def test_runs_that_cannot_be_compared_are_marked(tmp_path):
    folders = [write_run(tmp_path / n, [1.0, 0.0], key={"ocr_tokens": n == "a"}) for n in "ab"]
    text = "\n".join(printed(compare(folders, strict=False), 1000))
    assert "not comparable" in text and "ocr_tokens (True and False)" in text


def test_markdown_holds_every_run_and_is_written_into_a_folder(comparison, demo_sweep):
    path = write_markdown(comparison, demo_sweep)
    assert path == demo_sweep / "table.md" and path.read_text() == markdown(comparison)
    rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1
    assert len(rows) == 2 + 4 + 3
    assert rows[3].startswith(r"| 1 | lora\_r16 | ")


def test_labels_cannot_break_the_table(tmp_path):
    folders = [write_run(tmp_path / str(k), [1.0, 0.0], settings=config(seed=f"[red]|x{k}[/red]\n")) for k in range(2)]
    comparison = compare(folders)
    assert "[red]|x0[/red]" in " ".join(printed(comparison, 200))
    rows = [line for line in markdown(comparison).splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1


def test_the_picture_refers_to_nothing_on_the_network(comparison, tmp_path):
    write_svg(comparison, tmp_path / "table.svg", title="two runs")
    picture = (tmp_path / "table.svg").read_text()
    assert picture.startswith("<svg") and "lora_r16" in picture and "better" in picture
    assert "@font-face" not in picture and "url(http" not in picture and str(tmp_path) not in picture


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (5210.4, "5,210"), (75_776, "75.8 k"), (9_805_824, "9.8 M"), (3_019_166_144, "3.0 G")],
)
def test_counts_are_short(number, text):
    assert count(number) == text


@pytest.mark.parametrize(("value", "text"), [(0.0123, "+1.2"), (-0.0123, "-1.2"), (0.0001, "0.0"), (-0.0001, "0.0")])
def test_differences_are_signed_unless_they_round_to_zero(value, text):
    assert signed(value) == text
