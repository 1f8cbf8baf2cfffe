"""LaTeX, CSV, power, and the verb that writes them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from run_folders import config, write_run

from mgm_exp.cli import main
from mgm_exp.compare import compare, csv_text, latex
from mgm_exp.compare import comparison as room
from mgm_exp.compare.power import power_lines, power_needed
from mgm_exp.errors import UserError


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(room, "RESAMPLES", 500)


def test_latex_holds_every_completed_run_and_escapes_what_it_must(demo_sweep):
    text = latex(compare(demo_sweep))
    body = re.findall(r"^    (.* & .*) \\\\$", text, re.MULTILINE)
    assert len(body) == 1 + 3 + 3 and len({row.count("&") for row in body}) == 1
    assert r"lora\_r16 & 64." in text and r"\textbf{$+$2" in text and "full lr=9 &" not in text
    assert not re.search(r"(?<!\\)_", re.sub(r"^%.*$", "", text, flags=re.MULTILINE))
    for name in ("table", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1


def test_latex_cannot_be_broken_by_a_label(tmp_path):
    folders = [
        write_run(tmp_path / str(k), [1.0, 0.0], settings=config(model={"name": f"a{k}\\input{{x}}%&$#^~\n\\\\"}))
        for k in range(2)
    ]
    text = latex(compare(folders))
    assert r"\input" not in re.sub(r"^%.*$", "", text, flags=re.MULTILINE)
    assert r"a1\textbackslash{}input\{x\}\%\&\$\#\textasciicircum{}\textasciitilde{}" in text


def test_csv_is_a_line_for_each_arm_and_benchmark_with_numbers_as_they_are(demo_sweep):
    found = compare(demo_sweep)
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [row["arm"] for row in rows] == ["lora_r8", "lora_r16", "full", "full lr=9"]
    pair = found["pairs"][1]
    assert float(rows[2]["difference"]) == pair["difference"] and float(rows[2]["p_adjusted"]) == pair["p_adjusted"]
    assert (rows[2]["verdict"], rows[0]["is_baseline"], rows[3]["status"]) == ("better", "true", "failed")
    assert rows[1]["adapter.rank"] == "16" and rows[1]["group"] == rows[0]["group"] != rows[2]["group"]
    assert rows[0]["difference"] == "" and rows[3]["cause"].startswith("the loss is not finite")


def test_csv_holds_no_formula(tmp_path):
    folders = [write_run(tmp_path / str(k), [1.0, 0.0], settings=config(model={"name": f"=cmd{k}"})) for k in range(2)]
    rows = list(csv.DictReader(io.StringIO(csv_text(compare(folders)))))
    assert [row["arm"] for row in rows] == ["'=cmd0", "'=cmd1"] and rows[1]["difference"] == "0.0"


# -- power -------------------------------------------------------------------------------------------------------------


def pair(standard_error: float, seed_error: float | None = None, n_seeds=(1, 1), n: int = 5000) -> dict:
    return {
        "benchmark": "demo",
        "n": n,
        "standard_error": standard_error,
        "seed_error": seed_error,
        "n_seeds": list(n_seeds),
    }


def test_questions_needed_follow_from_the_measured_spread():
    """10 % discordant answers: variance 0.1 a question, so one point takes 7.849 * 0.1 / 0.01 ** 2 questions."""
    found = power_needed([pair(math.sqrt(0.1 / 5000))], 0.01, 0.05, 0.8)["benchmarks"]["demo"]
    assert found["questions"] == math.ceil(7.848880 * 0.1 / 0.01**2)
    assert found["questions_adjusted"] == found["questions"] and found["seeds"] is None


def test_more_comparisons_take_more_questions():
    one, many = ([pair(0.004)] * k for k in (1, 15))
    needed = [power_needed(pairs, 0.01, 0.05, 0.8)["benchmarks"]["demo"] for pairs in (one, many)]
    assert needed[0]["questions"] == needed[1]["questions"] < needed[1]["questions_adjusted"]


def test_seeds_needed_bring_the_error_down_to_what_is_wanted():
    """Three seeds that spread by one point, questions that add 0.2: enough seeds reach it, one fewer does not."""
    between = 0.01**2
    measured = pair(math.sqrt(0.002**2 + 2 * between / 3), math.sqrt(2 * between / 3), (3, 3))
    found = power_needed([measured], 0.01, 0.05, 0.8)["benchmarks"]["demo"]
    assert found["seed_sd"] == pytest.approx(0.01)

    def detectable(seeds):
        return 2.801585 * math.sqrt(0.002**2 + 2 * between / seeds)

    assert detectable(found["seeds"]) <= 0.01 < detectable(found["seeds"] - 1)


def test_where_questions_are_too_few_no_number_of_seeds_helps():
    measured = pair(math.sqrt(0.02**2 + 1e-4), 1e-2, (2, 2), n=100)
    needed = power_needed([measured], 0.01, 0.05, 0.8)
    assert needed["benchmarks"]["demo"]["seeds"] is None
    assert "with so few questions no number of seeds is enough" in power_lines(needed)[1]


def test_the_questions_that_are_said_to_be_needed_find_the_difference():
    """Simulated: with as many questions as are asked for, four in five true differences of four points are found."""
    from mgm_exp.compare.statistics import paired_difference

    generator = np.random.default_rng(0)

    def draw(n):
        a = (generator.random(n) < 0.5).astype(float)
        lost, gained = (generator.random(n) < rate for rate in (0.08, 0.16))
        return a, np.where(a == 1, a - lost, a + gained)

    a, b = draw(4000)
    measured = pair(paired_difference(a, b).standard_error, n=4000)
    needed = power_needed([measured], 0.04, 0.05, 0.8)["benchmarks"]["demo"]["questions"]
    found = [paired_difference(*draw(needed)).ci_low > 0 for _ in range(300)]
    assert 0.70 <= np.mean(found) <= 0.90


@pytest.mark.parametrize("delta", ["0", "1", "-0.01", "nan", "50"])
def test_a_difference_that_is_none_is_refused(demo_sweep, delta):
    with pytest.raises(UserError, match=r"0\.01 for one point"):
        compare(demo_sweep, power=float(delta))
    assert main(["report", str(demo_sweep), f"--power={delta}"]) == 2


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_a_sweep_gets_its_files(demo_sweep, capsys):
    assert main(["report", str(demo_sweep), "--power", "0.02", "--all-pairs", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert {"table.md", "report.html", "comparison.json"} <= {path.name for path in demo_sweep.iterdir()}
    assert "to find a true difference of 2 points" in " ".join(out.split()) and "(all pairs)" in " ".join(out.split())
    written = json.loads((demo_sweep / "comparison.json").read_text())
    assert len(written["pairs"]) == 3 and written["method"]["all_pairs"] is True
    assert written["power"]["difference"] == 0.02
    assert [(pair["a"], pair["b"]) for pair in written["pairs"]] == [("0", "1"), ("0", "2"), ("1", "2")]


@pytest.mark.parametrize(
    ("name", "start"), [("x.md", "**"), ("x.tex", "% "), ("x.csv", "benchmark,"), ("x.html", "<!DOCTYPE html>")]
)
def test_the_ending_of_the_file_says_what_is_written(demo_sweep, tmp_path, name, start):
    out = tmp_path / "out"
    out.mkdir()
    assert main(["report", str(demo_sweep), "--out", str(out / name)]) == 0
    assert (out / name).read_text().lower().startswith(start.lower())
    assert sorted(path.name for path in out.iterdir()) == sorted([name, "comparison.json"])


@pytest.mark.parametrize("out", ["x.pdf", "none/x.md", "folder.md"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(demo_sweep, tmp_path, capsys, out):
    (tmp_path / "folder.md").mkdir()
    assert main(["report", str(demo_sweep), "--out", str(tmp_path / out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / "comparison.json").exists()


def test_watching_writes_anew_when_a_run_ends_and_stops_cleanly(demo_sweep):
    command = [sys.executable, "-m", "mgm_exp.cli", "report", str(demo_sweep), "--watch", "0.2"]
    page, new = demo_sweep / "report.html", demo_sweep / "3" / "result.json"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            wait_until(page.exists)
            result = json.loads(new.read_text())
            new.write_text(json.dumps(result | {"error": {"cause": "the disk is full"}}))
            wait_until(lambda: "the disk is full" in page.read_text())
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and "data-refresh" not in page.read_text()
    # The second page may be there, and the signal too, before its verdict is printed.
    assert "lora_r16 and lora_r8 are statistically tied" in out


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_pairs_are_adjusted_together_and_differ_from_each_other(tmp_path):
    generator = np.random.default_rng(4)
    skill = generator.beta(1, 1, 500)
    folders = [
        write_run(
            tmp_path / str(k),
            (generator.random(500) < skill + 0.1 * k).astype(float),
            settings=config(train__lr=0.1 * (1 + k)),
        )
        for k in range(4)
    ]
    few, all_of_them = compare(folders), compare(folders, all_pairs=True)
    assert [len(few["pairs"]), len(all_of_them["pairs"])] == [3, 6]
    for own, other in zip(few["pairs"], all_of_them["pairs"][:3], strict=True):
        assert own["p_value"] == other["p_value"] and own["p_adjusted"] <= other["p_adjusted"]
        assert own["p_discovery"] <= own["p_adjusted"]
    last = all_of_them["pairs"][-1]
    assert (last["a"], last["b"]) == (str(folders[2]), str(folders[3]))
    back = compare([folders[2], folders[3]])["pairs"][0]
    assert back["difference"] == pytest.approx(last["difference"]) and back["p_value"] == last["p_value"]
    assert (back["ci_low"], back["ci_high"]) == pytest.approx((last["ci_low"], last["ci_high"]), abs=1e-12)
