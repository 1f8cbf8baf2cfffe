"""The process that owns a W&B run: reads what happened as JSON lines and calls the W&B client.

It answers on standard output with JSON lines: ``run_dir`` and ``is_offline``, ``warning``, ``failure``, ``finished``.
It ends when it has finished, when it fails, and with the process that started it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mgm_exp.config import TrackerMode
from mgm_exp.store import die_with_parent

if TYPE_CHECKING:
    import wandb
    from PIL import Image

# Below this many free bytes W&B leaves the rest of the disk to checkpoints and results. The W&B client itself says
# nothing when a disk is full, and goes on losing rows.
SMALLEST_FREE = 64 * 2**20
DISK_CHECK_S = 10.0
# What W&B accepts.
ID_LIMIT = 64
TAG_LIMIT = 64
# The longer side of an image in the predictions table; larger images than the limit are not decoded at all.
IMAGE_SIDE = 384
IMAGE_PIXELS = 50_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

Reply = Callable[..., None]


class WandbRun:
    """One W&B run and what is sent to it.

    Args:
        run: The fields of a ``RunInfo``.
        tracker: The tracker section of the config.
        reply: Tells the other process something.
    """

    def __init__(self, run: Mapping[str, Any], tracker: Mapping[str, Any], reply: Reply) -> None:
        self._info = run
        self._tracker = tracker
        self._reply = reply
        self._stage = ""
        # Steps of the stages before this one: global_step never goes back.
        self._before = 0
        self._newest = 0
        self._next_disk_check = 0.0
        self.run = self._open()
        self.run.define_metric("global_step", hidden=True)

    def _open(self) -> wandb.Run:
        mode = self._mode()
        if mode == "online":
            before = set(self._folders())
            try:
                run = self._init("online")
                self._reply(run_dir=str(Path(run.dir).parent), is_offline=False)
                return run
            except Exception as error:  # noqa: BLE001 - CommError, UsageError, AuthenticationError, what a network does
                self._reply(warning=f"W&B cannot be reached ({first_line(error)}); this run is recorded offline")
                _end_service()
                for attempt in set(self._folders()) - before:
                    shutil.rmtree(attempt, ignore_errors=True)
        run = self._init("offline")
        self._reply(run_dir=str(Path(run.dir).parent), is_offline=True)
        return run

    def _folders(self) -> list[Path]:
        return list((Path(self._info["run_dir"]) / "wandb").glob("run-*"))

    def _mode(self) -> str:
        """What the config says, else what ``WANDB_MODE`` says, else online where there is a key."""
        if self._tracker["mode"] != TrackerMode.auto.value:
            return str(self._tracker["mode"])
        named = os.environ.get("WANDB_MODE", "")
        if named in ("online", "offline"):
            return named
        return "online" if self._has_key() else "offline"

    def _has_key(self) -> bool:
        if os.environ.get("WANDB_API_KEY"):
            return True
        import wandb
        from wandb.sdk.lib import wbauth

        server = self._tracker["base_url"] or wandb.setup().settings.base_url
        return wbauth.read_netrc_auth(host=server) is not None

    def _init(self, mode: str) -> wandb.Run:
        import wandb

        settings = wandb.Settings(
            # A dead network costs minutes, or the whole run, by default.
            init_timeout=10,
            login_timeout=5,
            finish_timeout=30,
            finish_timeout_raises=True,
            # A run folder can be moved and archived: no links.
            symlink=False,
            # log.txt has what is printed.
            console="off",
            silent=True,
            # 15 s by default: a kill would lose them.
            x_transaction_log_flush_interval=1,
            # The manifest has commit, diff, packages and command with their secrets masked; W&B's copies have them.
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_meta=True,
            x_save_requirements=False,
            # System metrics are those of the training process.
            x_stats_pid=os.getppid(),
        )
        if self._tracker["base_url"] is not None:
            settings.base_url = self._tracker["base_url"]
        info = self._info
        return wandb.init(
            project=self._tracker["project"],
            entity=self._tracker["entity"],
            id=run_id(info["run_id"]),
            name=info["name"],
            group=info["group"],
            job_type=info["job_type"],
            tags=tags(info["tags"]),
            config=dict(info["config"]),
            dir=info["run_dir"],
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=settings,
        )

    def stage_started(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends the rows that hold already; those that the server has from before a resume are not sent twice.

        A stage begins again in the same run where one of its processes had to be replaced.
        """
        begins_again = stage == self._stage
        if not begins_again:
            self._stage, self._before = stage, self._newest
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        there = int(self.run.summary.get(f"{stage}/step") or 0) if self.run.resumed or begins_again else 0
        for row in rows:
            if row["step"] > there:
                self.row(row)
            self._newest = max(self._newest, self._before + int(row["step"]))

    def row(self, row: Mapping[str, Any]) -> None:
        """Logs the numbers of a row; ``<stage>/step`` is their axis and ``global_step`` counts over all stages."""
        stage = row.get("stage", self._stage)
        self._newest = max(self._newest, self._before + int(row["step"]))
        values = {f"{stage}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        values.update({f"{stage}/{key}": float(text) for key, text in row.get("non_finite", {}).items()})
        if "event" in row:
            values[f"{stage}/event/{row['event']}"] = 1
        self.run.log({**values, "global_step": self._before + int(row["step"])})

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """Puts the numbers of a stage's summary into the run's."""
        numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
        self.run.summary.update({f"{stage}/summary/{key}": value for key, value in numbers.items()})
        self.run.summary.update({f"{stage}/summary/reused": reused})

    def predictions(self, benchmark: str, path: str, image_root: str, metrics: Mapping[str, float]) -> None:
        """Logs the metrics and a table of evenly chosen predictions with their images."""
        import wandb

        self.run.summary.update(dict(metrics))
        columns = ["question_id", "image", "question", "prediction", "answers", "score", "question_type"]
        table = wandb.Table(columns=columns)
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        for row in evenly(rows, int(self._tracker["table_rows"])):
            picture = thumbnail(Path(image_root), row)
            table.add_data(
                str(row["question_id"]),
                None if picture is None else wandb.Image(picture, file_type="jpg"),
                str(row["question"]),
                str(row["prediction"]),
                "\n".join(str(answer) for answer in row["answers"]),
                row["score"],
                str(row["question_type"]),
            )
        if rows:
            self.run.log({f"predictions/{benchmark}": table, "global_step": self._newest})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Puts the result into the summary and closes the run."""
        facts = {key: value for key, value in result.items() if isinstance(value, (str, int, float))}
        error = result.get("error") or {}
        facts.update({f"error/{key}": value for key, value in error.items()})
        self.run.summary.update({**facts, **(result.get("metrics") or {})})
        self.run.finish(exit_code=0 if result["status"] == "completed" else 1)

    def check_disk(self) -> None:
        """Raises OSError when almost nothing is left on the disk of the run folder."""
        now = time.monotonic()
        if now < self._next_disk_check:
            return
        self._next_disk_check = now + DISK_CHECK_S
        free = shutil.disk_usage(self._info["run_dir"]).free
        if free < SMALLEST_FREE:
            raise OSError(f"only {free:,} bytes are free on the disk of {self._info['run_dir']}")


def _end_service() -> None:
    """Ends W&B's helper process, which would refuse the id of a run that it could not begin as being in use."""
    import wandb

    try:
        wandb.teardown()
    except SystemExit:  # how the client passes the helper's exit code on
        return


def run_id(text: str) -> str:
    """A W&B id: at most 64 characters, none that W&B refuses; a changed one keeps a hash of the whole."""
    plain = re.sub(r"[^A-Za-z0-9._=+,-]", "-", text)
    if plain == text and len(text) <= ID_LIMIT:
        return text
    return f"{plain[: ID_LIMIT - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def tags(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides as W&B tags: 1 to 64 characters each, none twice."""
    short = [text if len(text) <= TAG_LIMIT else f"{text[: TAG_LIMIT - 3]}..." for text in overrides if text]
    return tuple(dict.fromkeys(short))


def evenly(rows: Sequence[Any], wanted: int) -> list[Any]:
    """At most ``wanted`` rows, spread evenly over all: the same ones for every run of a benchmark."""
    if wanted >= len(rows):
        return list(rows)
    return [rows[math.floor(i * len(rows) / wanted)] for i in range(wanted)]


def thumbnail(root: Path, row: Mapping[str, Any]) -> Image.Image | None:
    """The small picture of a prediction, or None where there is none below ``root`` that can be shown."""
    from PIL import Image

    named = [str(row["image"])] if row.get("image") else []
    guesses = [f"{row.get('image_id', '')}{suffix}" for suffix in ("", ".png", ".jpg", ".jpeg")]
    folder = root.resolve()
    for name in named + guesses:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            continue
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > IMAGE_PIXELS:
                    return None
                picture = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        return picture
    return None


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def serve(calls: BinaryIO, reply: Reply) -> int:
    """Carries out what the lines say until ``finish`` or their end. Returns the exit code."""
    run: WandbRun | None = None
    for line in calls:
        try:
            message = json.loads(line)
            call = message.pop("call")
            if run is None:
                run = WandbRun(message["run"], message["tracker"], reply)
            else:
                run.check_disk()
                getattr(run, call)(**message)
        except Exception as error:  # noqa: BLE001 - said to the run, which goes on without W&B
            reply(failure=first_line(error))
            return 1
        if call == "finish":
            reply(finished=True)
            return 0
    return 1


def main() -> None:
    """Serves the process whose id is the first argument."""
    die_with_parent(parent_pid=int(sys.argv[1]))
    # Batch systems send these to every process of a job; what becomes of the run comes through the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # What libraries print goes to the client's log; the way back is ours alone.
    with os.fdopen(os.dup(1), "wb", buffering=0) as back:
        os.dup2(2, 1)

        def reply(**facts: Any) -> None:
            back.write(json.dumps(facts).encode() + b"\n")

        code = serve(sys.stdin.buffer, reply)
    # The W&B client waits for its own helper when Python ends, without a limit; whatever mattered is finished.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
