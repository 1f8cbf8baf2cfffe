"""The page of a comparison: whole, escaped, self-contained, and right about what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from run_folders import config, write_run, write_sweep

from mgm_exp.compare import compare, load_runs
from mgm_exp.compare.html import html_page, write_html
from mgm_exp.compare.html.answers import statistics_of, thumbnail
from mgm_exp.compare.html.curves import thinned
from mgm_exp.compare.html.plot import Scale, round_values, scale_of, short
from mgm_exp.compare.html.trade import importance, levels, pareto

VOID = frozenset("br hr img input meta link wbr".split())


class _Outline(HTMLParser):
    """Headings, ids, table headings, and whether every element that opens is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.addresses += [str(found[name]) for name in ("src", "href", "action", "data", "poster") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def _outline(text: str) -> _Outline:
    found = _Outline()
    found.feed(text)
    assert not found.open
    return found


def _page(*paths: Path, **options: Any) -> str:
    return html_page(compare(paths, strict=False, **options), load_runs(list(paths)))


def _curves(folder: Path, *, n: int = 50, scale: float = 1.0) -> None:
    rows = [
        {
            "stage": stage,
            "step": k + 1,
            "loss": scale * 5 / (k + 1),
            "lr": 0.001,
            "grad_norm": 1.0,
            "tokens_per_s": 900.0,
        }
        for stage in ("align", "instruct")
        for k in range(n)
    ]
    lines = [json.dumps(row) for row in rows] + [json.dumps({"event": "spike", "step": 9}), '{"stage": "instr']
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_trouble_in_training_is_shown_with_its_samples_escaped(demo_sweep: Path) -> None:
    assert "Trouble in training" not in _page(demo_sweep)
    run = next(path for path in sorted(demo_sweep.iterdir()) if (path / "result.json").exists())
    row = {"event": "spike", "stage": "instruct", "step": 3, "action": "skip", "detail": "loss 40, usually 2"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "reason": "spike", "sample_ids": ["<script>", "b", "c", "d"]}) + "\n")
        file.write('{"event": "resumed", "stage": "instruct", "step": 3}\n{"event": "sp')
    text = _page(demo_sweep)
    assert "loss 40, usually 2" in text
    assert "&lt;script&gt;, b, c and 1 more" in text
    assert "resumed" not in text.split('id="trouble"')[1].split("</section>")[0]


def test_what_runs_took_of_their_machines_is_drawn(demo_sweep: Path) -> None:
    assert 'id="machine"' not in _page(demo_sweep)
    run = next(path for path in sorted(demo_sweep.iterdir()) if (path / "result.json").exists())
    gpus = [{"index": 0, "memory_used_gib": 21.5, "utilization": 0.5}, {"index": 1, "memory_used_gib": 11.0}]
    samples = [{"t": 100.0 + 10 * k, "process_memory_gib": 1.0 + k, "gpus": gpus} for k in range(4)]
    broken = [
        {"t": "late"},
        {"t": 10**400},
        {"t": 200.0, "process_memory_gib": "much", "gpus": [3, {"memory_used_gib": None}]},
    ]
    (run / "system.jsonl").write_text("\n".join(map(json.dumps, [*samples, *broken])) + '\n{"t": 2')
    section = _page(demo_sweep).split('id="machine"')[1].split("</section>")[0]
    assert section.count('class="plot zoom"') == 3  # nothing was said of processors
    table = section.split("<tbody>")[1]
    assert ">21.5<" in table and ">50<" in table and ">4<" in table and ">2.5<" in table


def test_page_has_a_verdict_first_and_every_section_it_has_data_for(demo_sweep: Path) -> None:
    for number in range(3):
        _curves(demo_sweep / str(number), scale=number + 1)
    text = _page(demo_sweep)
    ids = _outline(text).ids
    wanted = [
        "verdict",
        "runs",
        "ended",
        "differences",
        "remarks",
        "curves",
        "costs",
        "types",
        "answers",
        "disagreements",
    ]
    assert [name for name in ids if name in wanted] == wanted
    assert ids[-1] == "reproducibility"
    assert len(text.encode()) < 300_000
    assert "the loss is not finite at step 12" in text and "Give a lower train.lr." in text


def test_page_loads_nothing(demo_sweep: Path) -> None:
    text = _page(demo_sweep)
    assert "default-src &#x27;none&#x27;" in text
    assert all(address.startswith(("#", "data:image/")) for address in _outline(text).addresses)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)


def test_a_page_links_to_the_wrong_answers_of_its_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / name, [1.0, 0.0, 0.5]) for name in ("a b", "c")]
    (runs[0] / "galleries").mkdir()
    (runs[0] / "galleries" / "demo.html").write_text("")
    (tmp_path / "pages").mkdir()
    page = write_html(compare(runs, strict=False), load_runs(runs), tmp_path / "pages" / "report.html")
    linked = [one for one in _outline(page.read_text()).addresses if "galleries" in one]
    assert linked == ["../runs/a%20b/galleries/demo.html"]


def test_what_comes_from_runs_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'"

    def edit(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "question": evil, "prediction": evil, "answers": [evil], "image": "../../etc/passwd"}

    for number, name in enumerate(("a", evil)):
        settings = config("lora_r8")
        settings["adapter"]["name"] = name
        scores = [float((k + number) % 2) for k in range(40)]
        write_run(tmp_path / str(number), scores, settings=settings, types=[evil, "other"] * 20, edit=edit)
    write_run(tmp_path / "2", settings=config(name=evil), status="failed", error={"message": evil, "advice": evil})
    text = _page(*(tmp_path / str(k) for k in range(3)))
    _outline(text)
    assert evil not in text and "<script>alert" not in text and "<img src=x" not in text
    assert text.count("<script>") == 2  # the page's own and the report's


def test_damaged_and_empty_folders_make_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "whole", [1.0, 0.0, 1.0])
    killed = write_run(tmp_path / "killed")
    (killed / "result.json").unlink()
    (killed / "manifest.json").write_text("[1, 2")
    (killed / "metrics.jsonl").write_bytes(b'\xff\xfe{"loss"\n{"step": NaN}\n')
    text = _page(tmp_path / "whole", killed)
    _outline(text)
    assert "it was killed: there is no result.json" in text


def test_seeds_of_a_configuration_are_one_row(tmp_path: Path) -> None:
    for number in range(4):
        scores = [float((k * 7 + number) % 3 > number // 2) for k in range(60)]
        adapter = ("lora_r8", "full")[number // 2]
        write_run(tmp_path / "s" / str(number), scores, settings=config(adapter, seed=number % 2))
    trials = [{"number": k, "params": {"adapter": "x", "seed": k % 2}, "status": "completed"} for k in range(4)]
    text = _page(write_sweep(tmp_path / "s", trials))
    table = text.split('id="arms"')[1].split("</table>")[0]
    assert table.count("<tr>") == 3  # the heading and two configurations
    # The highest is a configuration, not the luckiest of its seeds; a run's own interval is said to be what it is.
    told = re.search(r"Highest on demo</dt><dd>[\d.]+ %</dd><dd class=\"detail\">[^<]*, ([^<,]*, [^<]*)</dd>", text)
    assert told is not None and told[1] in table
    assert "Intervals of a single run are about other questions only" in text
    assert "runs that share a letter (group)" not in text


def test_page_follows_a_sweep_only_when_asked(demo_sweep: Path, tmp_path: Path) -> None:
    found, runs = compare(demo_sweep), load_runs([demo_sweep])
    assert 'id="live"' not in html_page(found, runs)
    path = write_html(found, runs, tmp_path / "report.html", refresh_s=5.0)
    assert 'data-refresh="5.0"' in path.read_text()


def test_stages_that_runs_share_are_drawn_once(tmp_path: Path) -> None:
    for number in range(3):
        folder = write_run(tmp_path / str(number), [1.0, 0.0], settings=config(train__lr=0.1 * (number + 1)))
        _curves(folder, scale=1.0 + (number == 2))
    text = _page(*(tmp_path / str(k) for k in range(3)))
    assert text.count('data-runs="0 1"') == text.count('data-runs="2"') == 8  # four quantities of two stages


# -- images ------------------------------------------------------------------------------------------------------------


def test_images_are_found_through_the_data_and_only_below_their_root(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    Image.new("RGB", (400, 200), "red").save(root / "in.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "out.png")
    (root / "no.png").write_bytes(b"not an image")
    assert thumbnail("in.png", [root]) is not None
    for name in ("../out.png", str(tmp_path / "out.png"), "no.png", "missing.png", "", "."):
        assert thumbnail(name, [root]) is None
    for number in range(2):
        folder = write_run(
            tmp_path / str(number),
            [float(number == k % 2) for k in range(4)],
            edit=lambda row: {**row, "image": "in.png"},
        )
        (folder / "config.yaml").write_text(f"data: {{image_root: {root}}}\nadapter: {{name: a{number}}}\n")
    assert "data:image/jpeg;base64," in _page(tmp_path / "0", tmp_path / "1")


# -- numbers -----------------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_inside_and_not_too_many(low: float, width: float, most: int) -> None:
    found = round_values(low, low + width, most)
    assert len(found) <= most
    assert all(low - 1e-6 * width <= value <= low + width * (1 + 1e-6) for value in found)


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20), st.booleans())
def test_a_scale_holds_its_values(values: list[float], is_log: bool) -> None:
    scale = scale_of(values, is_log=is_log)
    assert all(0 <= scale.place(value) <= 1 for value in values)


def test_scales_and_numbers_by_hand() -> None:
    assert Scale(1, 100, is_log=True).place(10) == pytest.approx(0.5)
    assert [short(value) for value in (0.0, 0.005, 5e-7, 12_000, 1.5e6)] == ["0", "0.005", "5.0e-7", "12k", "1.5M"]


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_pareto_front_is_what_no_other_point_beats(points: list[tuple[int, int, int]]) -> None:
    front = pareto([(name, float(cost), float(score)) for name, cost, score in points])

    def beaten(cost: float, score: float) -> bool:
        return any(c <= cost and s >= score and (c, s) != (cost, score) for _, c, s in points)

    assert {(cost, score) for _, cost, score in front} == {(c, s) for _, c, s in points if not beaten(c, s)}


def test_importance_is_the_share_of_the_variance_between_levels() -> None:
    assert importance({"a": [1.0, 1.0], "b": [3.0, 3.0]}) == pytest.approx(1.0)
    assert importance({"a": [1.0, 3.0], "b": [1.0, 3.0]}) == pytest.approx(0.0)
    assert importance({"a": [0.0, 2.0], "b": [2.0, 4.0]}) == pytest.approx(0.5)
    assert importance({"a": [2.0], "b": [2.0]}) == 0.0
    assert len(set(levels([k / 10 for k in range(20)]))) == 4
    assert levels(["x", None, True]) == ["x", "null", "true"]


def test_thinned_curves_keep_their_spikes() -> None:
    rows = [{"step": k, "loss": 1.0, "grad_norm": 1.0} for k in range(5000)]
    rows[1234] |= {"loss": 50.0}
    rows[4321] |= {"grad_norm": 90.0}
    found = thinned(rows, 60)
    assert len(found) <= 62
    assert rows[1234] in found and rows[4321] in found and found[0] is rows[0] and found[-1] is rows[-1]


def test_answers_are_counted_without_case_and_spaces() -> None:
    rows = {str(k): {"prediction": text} for k, text in enumerate(["Red", " red ", "", "a  b"])}
    facts = statistics_of(rows)
    assert (facts["n"], facts["distinct"], facts["empty"], facts["words"]) == (4, 3, 1, 1.0)
    assert facts["top"][0] == ("red", 2)


def test_a_page_of_many_runs_stays_small(tmp_path: Path) -> None:
    """Images apart, a run costs a few kB: a page of hundreds opens at once."""
    rng = np.random.default_rng(0)
    trials: list[dict[str, Any]] = []
    for number in range(48):
        settings = config(adapter__rank=2 ** (1 + number % 4), train__lr=1e-4 * (1 + number))
        write_run(tmp_path / "sweep" / str(number), rng.random(30) < 0.5, settings=settings)
        _curves(tmp_path / "sweep" / str(number), scale=1 + number / 10, n=600)
        trials.append({"number": number, "params": {"lr": number}, "status": "completed"})
    assert len(_page(write_sweep(tmp_path / "sweep", trials))) < 280_000


# -- in a browser ------------------------------------------------------------------------------------------------------

_ACTIONS = """
<script>
var said = [];
window.addEventListener("error", function (event) { said.push("error " + event.message); });
var plot = document.querySelector(".plot.zoom"), inner = plot.querySelector("svg.lines");
plot.dispatchEvent(new KeyboardEvent("keydown", {key: "+"}));
said.push("zoomed " + (inner.getAttribute("viewBox") !== "0 0 10000 10000"));
plot.dispatchEvent(new KeyboardEvent("keydown", {key: "0"}));
said.push("whole " + (inner.getAttribute("viewBox") === "0 0 10000 10000"));
document.querySelector(".legend button").click();
said.push("hidden " + (document.querySelectorAll(".path.is-hidden").length > 0));
var heading = document.querySelectorAll("#runs thead button")[1];
heading.click();
said.push("sorted " + heading.parentNode.getAttribute("aria-sort"));
var labels = Array.from(document.querySelectorAll("#runs tbody th b"));
said.push("order " + labels.map(function (label) { return label.textContent; }));
said.push("wide " + (document.documentElement.scrollWidth > window.innerWidth));
var out = document.createElement("p");
out.id = "said";
out.textContent = said.join("; ");
document.body.appendChild(out);
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_works_in_a_browser_without_errors_or_requests(demo_sweep: Path, tmp_path: Path) -> None:
    for number in range(3):
        _curves(demo_sweep / str(number), scale=number + 1)
    path = tmp_path / "page.html"
    path.write_text(_page(demo_sweep).replace("</body>", f"{_ACTIONS}</body>"))
    done = subprocess.run(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--window-size=600,900", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = re.search(r'id="said">([^<]*)<', done.stdout)
    assert said is not None
    runs = [(run["metrics"].get("demo/accuracy", {"value": -1}), run) for run in compare(demo_sweep)["runs"]]
    order = ",".join(run["label"] for _, run in sorted(runs, key=lambda pair: -pair[0]["value"]))
    assert said[1] == f"zoomed true; whole true; hidden true; sorted descending; order {order}; wide false"
    # A load that the page's policy refuses is a message of the console, too.
    assert "CONSOLE" not in done.stderr
