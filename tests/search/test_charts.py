"""Charts that need nothing else to be shown, and say what the study says."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import optuna
import pytest

from mgm_exp.config import Direction
from mgm_exp.search.charts import draw_study, importances
from mgm_exp.search.drawing import Drawing, Scale


def study(trials: int, objectives: int = 1) -> optuna.Study:
    found = optuna.create_study(directions=["maximize"] * objectives, sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(trials):
        trial = found.ask()
        x = trial.suggest_float("train.lr", 1e-4, 1e-2, log=True)
        y = trial.suggest_categorical("<adapter & co>", ["a", "b"])
        if objectives == 1:
            trial.report(x, 1)
        if number % 4 == 3 and objectives == 1:
            found.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            found.tell(trial, [x + (y == "b") / 1000, -x][:objectives])
    return found


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return [element.text or "" for element in root.iter() if element.tag.endswith("text")]


def circles(path: Path) -> int:
    return sum(element.tag.endswith("circle") for element in ElementTree.parse(path).getroot().iter())


def test_four_charts_hold_every_trial(tmp_path: Path) -> None:
    files = draw_study(study(12), tmp_path, ["demo/accuracy"], [Direction.maximize])
    assert [path.name for path in files] == ["history.svg", "slices.svg", "parallel.svg", "importance.svg"]
    assert circles(tmp_path / "history.svg") == 12
    assert circles(tmp_path / "slices.svg") == 24
    assert "<adapter & co>" in texts(tmp_path / "slices.svg"), "names are escaped, not lost"
    for path in files:
        assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", ""), (
            "nothing is loaded from elsewhere"
        )


def test_rungs_show_who_climbed_how_far(tmp_path: Path) -> None:
    found = optuna.create_study(direction="maximize")
    for length in (1, 1, 2, 3):
        trial = found.ask()
        for step in range(1, length + 1):
            trial.report(step / 10, 10 * step)
        trial.set_user_attr("paused", 10 * min(length, 2))
        if length == 1:
            found.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif length == 3:
            found.tell(trial, 0.4)
    (file,) = draw_study(found, tmp_path, ["demo/accuracy"], [Direction.maximize])
    assert file.name == "rungs.svg" and circles(file) == 4
    assert {"10", "20"} <= set(texts(file))
    assert all(words in file.read_text() for words in ("was not promoted", "waits", "ran to its end"))


def test_what_decides_is_said_in_shares(tmp_path: Path) -> None:
    shares = importances(study(24))
    assert set(shares) == {"train.lr", "<adapter & co>"}
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(study(1)) == {}


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    (file,) = draw_study(study(8, 2), tmp_path, ["a", "b"], [Direction.maximize] * 2)
    assert file.name == "pareto.svg" and circles(file) == 8


@pytest.mark.parametrize("trials", [0, 1])
def test_a_search_that_has_just_begun_has_no_chart(tmp_path: Path, trials: int) -> None:
    assert draw_study(study(trials), tmp_path, ["a"], [Direction.maximize]) == []


def test_a_scale_puts_ends_at_its_ends() -> None:
    scale = Scale([1, 100], 0, 10, log=True)
    assert [scale(value) for value in (1, 10, 100)] == pytest.approx([0, 5, 10])
    assert Scale([3, 3], 0, 10)(3) == 5
    assert Scale([0, 1], 0, 10, log=True)(1) == 10


def test_a_drawing_is_escaped(tmp_path: Path) -> None:
    drawing = Drawing(10, 10, "<script>alert(1)</script>")
    drawing.point(1, 1, says='"><script>')
    assert "<script" not in drawing.save(tmp_path / "x.svg").read_text()
