"""``data=blip2`` on the real Data-Juicer and the demo captioner: recipes share what they can, kills change nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .command_line import Command, read, rows

pytest.importorskip("data_juicer", reason="the extra `data` is not installed")


class Curate(Command):
    """``mgm-exp curate ...``."""

    def arguments(self, *overrides: str) -> list[str]:
        return ["curate", *super().arguments("data=blip2", *overrides)]

    def argv(self, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "mgm_exp.cli", *self.arguments(*overrides)]

    def main(self, arguments: list[str]) -> int:
        from mgm_exp.cli import main

        return main(arguments)

    def folders(self) -> list[Path]:
        return sorted((self.root / "data").iterdir(), key=lambda path: path.stat().st_mtime)


STAGES = ("check", "recaption", "measure", "curate")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, without the places of this run's folders."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".parquet"}
    report = read(folder / "report.json")
    for stage in ("align", "instruct"):
        del report[stage]["image_root"]
    found["report.json"] = json.dumps(report).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(found.items())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Curate:
    curate = Curate(tmp_path_factory.mktemp("curate") / "outputs")
    done = curate.run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return curate


def test_every_row_has_a_fate_and_the_waterfall_adds_up(undisturbed: Curate) -> None:
    (folder,) = undisturbed.folders()
    report = read(folder / "report.json")["align"]
    fates = rows(folder / "fates-align.jsonl")
    assert len(fates) == report["rows"] == 48
    kept = [fate["id"] for fate in fates if fate["fate"] != "dropped"]
    assert kept == [row["id"] for row in rows(folder / "align.jsonl")]
    for step, after in zip(report["waterfall"], report["waterfall"][1:], strict=False):
        assert step["rows_out"] == after["rows_in"] == step["rows_in"] - step["dropped"] + step["added"]
    assert report["waterfall"][-1]["rows_out"] == report["kept"] == len(kept)
    names = [step["step"] for step in report["waterfall"]]
    assert names == [
        *("rows", "images", "recaption"),
        *("words_num", "text_length", "word_repetition", "character_repetition", "trainable"),
    ]
    assert all(row["raw_caption"] for row in rows(folder / "align.jsonl"))
    page = (folder / "report.html").read_text()
    assert "demo-blip2 (synthetic)" in page and "data:image/jpeg;base64," in page
    assert 'src="http' not in page and 'href="http' not in page


def test_the_emitted_recipe_is_data_juicers_own(undisturbed: Curate) -> None:
    import yaml

    (folder,) = undisturbed.folders()
    process = yaml.safe_load((folder / "recipe.yaml").read_text())["process"]
    assert [next(iter(operator)) for operator in process] == [
        *("words_num_filter", "text_length_filter", "word_repetition_filter", "character_repetition_filter")
    ]
    assert process[0]["words_num_filter"]["min_num"] == 4


def test_recipes_that_differ_in_limits_share_captions_and_values(undisturbed: Curate) -> None:
    done = undisturbed.run("data.recipe.words_num.min=p50", "data.recipe.text_length.max=75")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage in ("demo", "check", "recaption", "measure"):
        assert f"{stage}: reused" in done.stdout
    assert "curate: made" in done.stdout
    newest = undisturbed.folders()[-1]
    dropped = read(newest / "report.json")["align"]["dropped"]
    assert set(dropped) <= {"words_num", "text_length"} and sum(dropped.values()) > 10
    for fate in rows(newest / "fates-align.jsonl"):
        if fate["fate"] == "dropped":
            # Data-Juicer does not count what consists of digits and signs alone.
            count = {"words_num": lambda text: sum(any(map(str.isalpha, word)) for word in text.split())}
            count["text_length"] = len
            (caption,) = [row["text"] for row in _captions(undisturbed) if row["id"] == fate["id"]]
            assert count[fate["step"]](_clean(caption)) == fate["value"]


def _captions(curate: Curate) -> list[dict[str, str]]:
    (file,) = (curate.store / "recaption").glob("*/captions.jsonl")
    return rows(file)


def _clean(text: str) -> str:
    return text.replace("<__dj__image>\n", "").replace(" <|__dj__eoc|>", "")


def test_the_builtin_engine_keeps_the_same_rows(undisturbed: Curate) -> None:
    done = undisturbed.run("data.recipe.engine=builtin")
    assert done.returncode == 0, done.stderr[-3000:]
    first, newest = undisturbed.folders()[0], undisturbed.folders()[-1]
    assert first != newest
    assert (first / "align.jsonl").read_bytes() == (newest / "align.jsonl").read_bytes()


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=[] if name == "measure" else pytest.mark.slow) for name in STAGES]
)
def test_a_kill_in_any_stage_and_the_same_command_give_the_same_files(
    undisturbed: Curate, stage: str, tmp_path: Path
) -> None:
    curate = Curate(tmp_path / "outputs")
    shutil.copytree(undisturbed.store, curate.store)  # what comes before the stage is not made again
    for name in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(curate.store / name)
    process = curate.start()
    deadline = time.monotonic() + 240
    try:
        while not list((curate.store / stage).glob("*.work*")):
            if process.poll() is not None:
                break  # the stage was too quick to be caught: then the repetition finds it done
            assert time.monotonic() < deadline, f"{stage} did not begin"
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert not _children_of_data_juicer(curate.root)
    done = curate.run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert digests(curate.folders()[0]) == digests(undisturbed.folders()[0])


def _children_of_data_juicer(root: Path) -> list[str]:
    """Processes of the killed command that still run after a moment: each of them dies with its parent."""
    for _ in range(1200):
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        alive = [line for line in listed.splitlines() if str(root) in line and "data_juicer" in line]
        if not alive:
            return []
        time.sleep(0.05)
    return alive


def test_raw_and_recaptioned_data_side_by_side_with_a_captioner_of_ones_own(tmp_path: Path) -> None:
    from mgm_exp.data.captioner.demo_blip2 import write_folder

    captioner = tmp_path / "blip2"
    write_folder(captioner)
    command = Command(tmp_path / "outputs")
    done = command.run("-m", "data=raw,blip2", "adapter=lora_r8", f"data.captioner.path={captioner}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sweep,) = (command.root / "sweeps").iterdir()
    raw, blip2 = (read(sweep / str(number) / "data.json") for number in (0, 1))
    assert raw["recaption"] is None and raw["align"]["changed"].get("recaptioned") is None
    assert blip2["recaption"]["captioner"] == "blip2" and blip2["align"]["changed"]["recaptioned"] > 40
    comparison = read(sweep / "comparison.json")
    assert [entry["name"] for entry in comparison["data"]] == ["raw", "blip2"]
    assert comparison["data"][0]["runs"] == ["0"] and comparison["data"][1]["align"]["words_mean"] > 10
    assert (sweep / "1" / "data.html").is_file()
    checks = [stage for number in (0, 1) for stage in read(sweep / str(number) / "manifest.json")["stages"]]
    assert [stage["reused"] for stage in checks if stage["name"] == "check"] == [False, True]
    assert json.dumps(comparison)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.captioner.path=/nowhere"], "data.captioner.path"),
        (["data.recipe.words_num.min=40", "data.recipe.engine=builtin"], "words_num"),
        (["data.recipe.watermark.max=0.5"], "data.recipe.watermark.path"),
        (["data.captioner.questions=[what?]"], "only describes"),
        (["data.captioner.policy=keep_if_better"], "data.captioner.scorer.path"),
    ],
)
def test_what_cannot_work_is_said_in_one_paragraph(
    undisturbed: Curate, tmp_path: Path, overrides: list[str], says: str
) -> None:
    done = undisturbed.run(*overrides)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert says in done.stderr and "Traceback" not in done.stderr
