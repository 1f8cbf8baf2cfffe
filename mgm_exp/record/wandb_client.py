"""The process that owns a W&B run: reads what happened as JSON lines and calls the W&B client.

It answers on standard output with JSON lines: ``is_offline``, ``warning``, ``failure``, ``finished``.
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
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from mgm_exp.config import TrackerMode
from mgm_exp.errors import UserError
from mgm_exp.store import die_with_parent, parse_record, read_text

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
# Seconds that W&B's own process has to send the rest when a run ends.
FINISH_S = 30.0
# Seconds for one question to the public API.
ASK_S = 20
# The longer side of an image in the predictions table; larger images than the limit are not decoded at all.
IMAGE_SIDE = 384
IMAGE_PIXELS = 50_000_000
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

Reply = Callable[..., None]
RowKey = tuple[int, str]


class WandbRun:
    """One W&B run and what is sent to it.

    Rows that W&B has already are passed over, so that a run can be continued, or sent again, without harm. W&B itself
    does not help with that: it counts rows, and its summary may be ahead of the rows that it has.

    Args:
        run: The fields of a ``RunInfo``.
        tracker: The tracker section of the config.
        reply: Tells the other process something.
        there: The rows that W&B has, where this is an upload of a run that ended before: online or not at all, in a
            folder that is thrown away.
        finish_s: Seconds that the server has at the end.
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        tracker: Mapping[str, Any],
        reply: Reply,
        *,
        there: Collection[RowKey] | None = None,
        finish_s: float = FINISH_S,
    ) -> None:
        self._info = run
        self._tracker = tracker
        self._reply = reply
        self._is_upload = there is not None
        self._there = set(there or ())
        self._finish_s = finish_s
        self._stage = ""
        # Steps of the stages before this one: global_step never goes back.
        self._before = 0
        self._newest = 0
        self._next_disk_check = 0.0
        self.run = self._init("online") if self._is_upload else self._open()
        self.run.define_metric("global_step", hidden=True)

    def _open(self) -> wandb.Run:
        mode = self._mode()
        if mode == "online":
            before = set(self._folders())
            try:
                run = self._init("online")
                if run.resumed:
                    self._there = set(rows_there(api(self._tracker).run(f"{run.entity}/{run.project}/{run.id}")))
                return run
            except Exception as error:  # noqa: BLE001 - CommError, UsageError, AuthenticationError, what a network does
                self._reply(warning=f"W&B cannot be reached ({first_line(error)}); this run is recorded offline")
                _end_service()
                for attempt in set(self._folders()) - before:
                    shutil.rmtree(attempt, ignore_errors=True)
        run = self._init("offline")
        self._reply(is_offline=True)
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
        return has_key(self._tracker["base_url"])

    def _init(self, mode: str) -> wandb.Run:
        import wandb

        settings = wandb.Settings(
            # A dead network costs minutes, or the whole run, by default.
            init_timeout=10,
            login_timeout=5,
            finish_timeout=self._finish_s,
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
            # System metrics are those of the training process: of an upload they would say nothing.
            x_stats_pid=os.getppid(),
            x_disable_stats=self._is_upload,
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
        """Sends the rows that hold already, but for those that W&B has: from before a resume, or from a process that
        had to be replaced.
        """
        if stage != self._stage:
            self._stage, self._before = stage, self._newest
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        for row in rows:
            self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        """Logs the numbers of a row; ``<stage>/step`` is their axis and ``global_step`` counts over all stages."""
        stage = row.get("stage", self._stage)
        self._newest = max(self._newest, self._before + int(row["step"]))
        values = {f"{stage}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        values.update({f"{stage}/{key}": float(text) for key, text in row.get("non_finite", {}).items()})
        if "event" in row:
            values[f"{stage}/event/{row['event']}"] = 1
        values["global_step"] = self._before + int(row["step"])
        if row_key(values) not in self._there:
            self._there.add(row_key(values))
            self.run.log(values)

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """Puts the numbers of a stage's summary into the run's."""
        numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
        self.run.summary.update({f"{stage}/summary/{key}": value for key, value in numbers.items()})
        self.run.summary.update({f"{stage}/summary/reused": reused})

    def predictions(
        self,
        benchmark: str,
        path: str,
        image_roots: Sequence[str],
        metrics: Mapping[str, float],
        is_there: bool = False,
    ) -> None:
        """Logs the metrics and a table of evenly chosen predictions with their images.

        Args:
            benchmark: Its name.
            path: The file of predictions.
            image_roots: Folders that the images may lie in.
            metrics: What the benchmark gave.
            is_there: W&B has the table already: only the metrics are sent.
        """
        import wandb

        self.run.summary.update(dict(metrics))
        if is_there:
            return
        columns = ["question_id", "image", "question", "prediction", "answers", "score", "question_type"]
        table = wandb.Table(columns=columns)
        rows = [parse_record(line) for line in read_text(path).splitlines()]
        for row in evenly(rows, int(self._tracker["table_rows"])):
            pictures = (thumbnail(Path(root), row) for root in image_roots)
            picture = next((found for found in pictures if found is not None), None)
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
            self.run.log({table_key(benchmark): table, "global_step": self._newest})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Puts the result into the summary and closes the run."""
        facts = {key: value for key, value in result.items() if isinstance(value, (str, int, float))}
        error = result.get("error") or {}
        facts.update({f"error/{key}": value for key, value in error.items()})
        self.run.summary.update({**facts, **(result.get("metrics") or {})})
        self.run.finish(exit_code=0 if result["status"] in ("completed", "paused") else 1)

    def check_disk(self) -> None:
        """Raises OSError when almost nothing is left on the disk of the run folder."""
        now = time.monotonic()
        if now < self._next_disk_check:
            return
        self._next_disk_check = now + DISK_CHECK_S
        free = shutil.disk_usage(self._info["run_dir"]).free
        if free < SMALLEST_FREE:
            raise OSError(f"only {free:,} bytes are free on the disk of {self._info['run_dir']}")


def has_key(base_url: str | None) -> bool:
    """Whether the environment or netrc holds a key for a server (None: the client's default)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb
    from wandb.sdk.lib import wbauth

    return wbauth.read_netrc_auth(host=base_url or wandb.setup().settings.base_url) is not None


def refuse_key_for(base_url: str | None) -> None:
    """Refuses to send the environment's key to a server that only a run folder names: the folder may be another's.

    A key in netrc belongs to one host and is safe.

    Raises:
        UserError: the key of ``WANDB_API_KEY`` would go to a host that neither the user nor the environment named.
    """
    if not base_url or not os.environ.get("WANDB_API_KEY"):
        return
    host = urlsplit(base_url).hostname
    if host in _LOOPBACK or host == urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname:
        return
    raise UserError(
        f"The run's configuration names the W&B server {base_url}, and WANDB_API_KEY would be sent there.",
        advice=f"Say that it is yours: --base-url {base_url} (or WANDB_BASE_URL), or put its key into netrc with "
        "`wandb login`.",
    )


def api(tracker: Mapping[str, Any]) -> wandb.Api:
    """W&B's public API at the tracker's server."""
    import wandb

    return wandb.Api(overrides={"base_url": tracker["base_url"]} if tracker["base_url"] else {}, timeout=ASK_S)


def row_key(values: Mapping[str, Any]) -> RowKey:
    """What tells the rows of a run apart: the step over all stages, and which event it is, if it is one."""
    return int(values["global_step"]), "".join(sorted(key for key in values if "/event/" in key))


def rows_there(run: Any) -> frozenset[RowKey]:
    """The rows that W&B has of a run of its public API; those of tables are none."""
    return frozenset(
        row_key(row)
        for row in run.scan_history(use_cache=False)
        if "global_step" in row and not any(key.startswith(table_key("")) for key in row)
    )


def table_key(benchmark: str) -> str:
    """What the table of a benchmark's predictions is called in W&B."""
    return f"predictions/{benchmark}"


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
