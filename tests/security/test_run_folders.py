"""What a run leaves: no key of the environment in any file, and no text of the data that would run in a page."""

from __future__ import annotations

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from recorded_run import HOSTILE, KEYS, RecordedRun

from mgm_exp.cli import main


class Page(HTMLParser):
    """Collects what a browser would run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.handlers: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.says = ""
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_script = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")
        for name, value in attrs:
            if name.startswith("on") or (value or "").lower().lstrip().startswith("javascript:"):
                self.handlers.append((tag, name))
            if name in ("src", "href", "action", "data") and "//" in (value or "")[:12]:
                self.fetched.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script and self.scripts:
            self.scripts[-1] += data
        else:
            self.says += data


def assert_harmless(file: Path) -> Page:
    page = Page(file.read_text(encoding="utf-8"))
    assert [script for script in page.scripts if "PWNED" in script.replace("\\u003c", "<") and "<" in script] == []
    assert page.handlers == [] and page.fetched == []
    return page


def keys_in(folder: Path) -> list[tuple[str, str]]:
    """(file, key) of every key of the environment that stands in a file, in clear or as base64 of nothing else."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    wanted = {name: value.encode() for name, value in KEYS.items()} | {"any canary": b"canary"}
    return [
        (str(path.relative_to(folder)), name)
        for path in files
        for content in [path.read_bytes() + os.fsencode(path.relative_to(folder))]
        for name, value in wanted.items()
        if value in content
    ]


@pytest.fixture
def with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def test_no_file_of_a_run_holds_a_key(hostile_run: RecordedRun) -> None:
    assert list(hostile_run.folder.glob("wandb/offline-run-*/*.wandb")), "W&B wrote its own files, too"
    assert (hostile_run.folder / ".hydra" / "config.yaml").is_file() and (hostile_run.folder / "log.txt").is_file()
    assert keys_in(hostile_run.root) == []


@pytest.mark.usefixtures("with_keys")
def test_a_report_of_hostile_runs_runs_nothing_and_holds_no_key(hostile_run: RecordedRun, tmp_path: Path) -> None:
    """Beside a run that others damaged on purpose."""
    other = tmp_path / "other"
    shutil.copytree(hostile_run.folder, other)
    rows = (other / "predictions" / "custom.jsonl").read_text().splitlines()
    changed = [json.dumps({**json.loads(row), "prediction": HOSTILE, "score": 1.0}) for row in rows]
    (other / "predictions" / "custom.jsonl").write_text("\n".join(changed) + "\n")
    result = json.loads((other / "result.json").read_text())
    result["metrics"]["custom/accuracy"] = 1.0
    (other / "result.json").write_text(json.dumps(result))
    damaged = tmp_path / "damaged"
    shutil.copytree(hostile_run.folder, damaged)
    (damaged / "result.json").write_text("[" * 100_000)
    (damaged / "data.json").write_text('{"align": ' + "9" * 5000 + "}")
    (damaged / "metrics.jsonl").write_text('{"step": 1, "stage": ' + "[" * 5000 + "\n")
    (damaged / "config.yaml").unlink()
    os.mkfifo(damaged / "config.yaml")
    out = tmp_path / "report" / "report.html"
    out.parent.mkdir()
    assert main(["report", str(hostile_run.folder), str(other), str(damaged), "--out", str(out)]) == 0
    page = assert_harmless(out)
    assert "PWNED()" in page.says, "the texts are shown, as texts"
    assert "damaged" in page.says and keys_in(out.parent) == []


def test_the_page_of_curated_data_runs_nothing(hostile_run: RecordedRun) -> None:
    assert "PWNED()" in assert_harmless(hostile_run.folder / "data.html").says


@pytest.mark.usefixtures("with_keys")
@pytest.mark.parametrize("launcher", ["slurm", "volcano"])
def test_no_job_holds_a_key(launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = ["image=registry.example/mgm@sha256:01", "outputs_claim=o", f"outputs_path={tmp_path}"]
    given = [f"hydra.launcher.{key}" for key in claim] if launcher == "volcano" else []
    arguments = [f"hydra/launcher={launcher}", *given, f"paths.root={tmp_path}/out", "seed=0"]
    assert main(["launch", "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out
    assert len(text) > 200 and "canary" not in text.lower()


@pytest.mark.usefixtures("with_keys")
@pytest.mark.parametrize(
    "override",
    [
        "tracker.base_url=https://me:canary@wandb.example.org",
        "tracker.base_url=https://hooks.slack.com/services/T000/B000/canarycanary",
        "sweep.storage=postgresql+psycopg://me:canary@db.example.org/studies",
        f"name={KEYS['WANDB_API_KEY']}",
        "+tracker.api_key=canary",
    ],
)
def test_a_secret_on_the_command_line_is_refused_before_a_file_is_made(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mgm_exp.command import main as run

    assert run([override, f"paths.root={tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert "canary" not in said and "environment" in said and not (tmp_path / "out").exists()


# -- folders of others ----------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(hostile_run: RecordedRun, tmp_path: Path) -> Path:
    """A run that was sent: its configuration names servers and commands of its maker."""
    folder = tmp_path / "sent"
    shutil.copytree(hostile_run.folder, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["eval"]["judge"] |= {"url": "https://judge.example.org", "model": "x"}
    config["tracker"]["base_url"] = "https://wandb.example.org"
    config["paths"]["mirror"] = f"file://{tmp_path}/mirror"
    config["launch"] |= {"hostfile": str(folder / "hosts"), "remote_shell": ["touch", str(tmp_path / "sentinel")]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.usefixtures("with_keys")
def test_a_foreign_run_gets_no_key_and_runs_no_command(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(foreign), "--out", str(tmp_path / "scores")]) == 2
    assert "judge.example.org" in capsys.readouterr().err
    assert main(["wandb-sync", str(foreign)]) != 0
    said = capsys.readouterr()
    assert "WANDB_API_KEY would be sent there" in said.out + said.err
    from mgm_exp.replay import read_run

    config = read_run(foreign).config
    assert config.launch.hostfile is None and config.launch.remote_shell[0] == "ssh"
    assert config.eval.judge.url == "https://judge.example.org", "a replay scores nothing"
    assert config.paths.mirror is None
    assert not (tmp_path / "sentinel").exists() and not (tmp_path / "mirror").exists()
