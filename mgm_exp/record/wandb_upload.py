"""Sends to W&B what run folders hold and W&B lacks: runs made offline, cut short by a network, or never sent.

What is sent is made from the files of the run folder, the source of truth, and not from what the W&B client left
there: its log ends where a disk was full or a process was killed, and its tables are lost without a word once the
folder was moved. What W&B has is asked for before and after, so that nothing is sent twice and what is said to be there
is there.

It is a process of its own, like :mod:`mgm_exp.record.wandb_client`: one JSON line for each run comes in
(:class:`Upload`), one goes out (:class:`Sent`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mgm_exp.errors import DataError, MgmError, UserError
from mgm_exp.record.recorder import Row, RunInfo, describe_run
from mgm_exp.record.secrets import MASK
from mgm_exp.record.wandb_client import (
    Reply,
    RowKey,
    WandbRun,
    api,
    first_line,
    has_key,
    refuse_key_for,
    row_key,
    rows_there,
    run_id,
    table_key,
)
from mgm_exp.record.wandb_sink import kill_client
from mgm_exp.store import die_with_parent, parse_record, read_record, read_text, read_yaml

# Seconds that W&B has at the end of a run to take the rest; a table with images may be some MB on a slow line.
FINISH_S = 600.0
# What was just sent is looked for again after so many seconds: W&B may take a moment to count it.
PATIENCE_S = (0.0, 1.0, 3.0, 10.0)
# A trial's own keys in its overrides say nothing to a reader of tags.
_OWN_KEYS = ("trial", "sweep.name", "sweep.pause_after")


@dataclass(frozen=True)
class Upload:
    """One run folder that is to be in W&B.

    Args:
        run_dir: The folder.
        image_roots: Folders that the images of each benchmark may lie in.
        tracker: Where to, over what the run's configuration says: ``project``, ``entity``, ``base_url``.
    """

    run_dir: str
    image_roots: Mapping[str, Sequence[str]]
    tracker: Mapping[str, str]


@dataclass(frozen=True)
class Sent:
    """What became of an :class:`Upload`.

    Args:
        run_dir: The folder.
        sent: What was sent, in words; empty where W&B had all of it.
        lacking: What W&B still lacks, in words; empty where it has everything.
        url: The run in W&B.
        error: Why it could not be sent.
        is_last: Whether nothing else was tried after it, because W&B itself failed.
    """

    run_dir: str
    sent: Sequence[str] = ()
    lacking: Sequence[str] = ()
    url: str = ""
    error: str = ""
    is_last: bool = False


@dataclass(frozen=True)
class Recorded:
    """What a run folder holds for W&B."""

    info: RunInfo
    tracker: Mapping[str, Any]
    rows: Sequence[Row]
    predictions: Mapping[str, Path]
    image_roots: Mapping[str, Sequence[str]]
    result: Mapping[str, Any]
    reused: Mapping[str, bool]

    @property
    def stages(self) -> dict[str, list[Row]]:
        """Rows of each trained stage, in the order of the stages."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(str(row.get("stage")), []).append(row)
        return found

    @property
    def row_keys(self) -> frozenset[RowKey]:
        """What :func:`row_key` gives for the rows once they are in W&B."""
        found: set[RowKey] = set()
        before = 0
        for stage, rows in self.stages.items():
            for row in rows:
                event = {f"{stage}/event/{row['event']}": 1} if "event" in row else {}
                found.add(row_key({**event, "global_step": before + int(row["step"])}))
            before = max((step for step, _ in found), default=before)
        return frozenset(found)


@dataclass(frozen=True)
class There:
    """What W&B has of a run."""

    rows: frozenset[RowKey] = frozenset()
    tables: frozenset[str] = frozenset()
    summary: Mapping[str, Any] | None = None


def read_recorded(upload: Upload) -> Recorded:
    """Reads a run folder, in whatever state the run left it.

    Raises:
        DataError: it is no run folder, or a file in it is damaged.
    """
    folder = Path(upload.run_dir)
    try:
        manifest = read_record(folder / "manifest.json")
        config = read_yaml(folder / "config.yaml") or {}
        result_file, rows_file = folder / "result.json", folder / "metrics.jsonl"
        result = read_record(result_file) if result_file.exists() else {}
        text = read_text(rows_file) if rows_file.exists() else ""
        # A process that was killed while it wrote leaves the last line unfinished.
        rows = [parse_record(line) for line in text.split("\n")[:-1] if line]
        if not all(isinstance(part, dict) for part in (manifest, config, result, *rows)):
            raise ValueError("it does not hold what a run writes")
        sweep = str(config["sweep"]["name"]) if config.get("trial") is not None else None
        tracker = {**config["tracker"], **upload.tracker}
        if "base_url" not in upload.tracker:
            refuse_key_for(tracker["base_url"])
        name = str(manifest["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} cannot be read as a run ({first_line(error)}).", advice="Its other files are as they were."
        ) from error
    benchmarks = result.get("eval_keys") or {}
    predictions = {name: folder / "predictions" / f"{name}.jsonl" for name in benchmarks}
    return Recorded(
        info=describe_run(config, folder.resolve(), run_id=name, overrides=_overrides(folder), sweep=sweep),
        tracker=tracker,
        rows=rows,
        predictions={name: path for name, path in predictions.items() if path.is_file()},
        image_roots=upload.image_roots,
        result=result or {"status": "interrupted", "metrics": {}},
        reused={str(stage.get("name")): bool(stage.get("reused")) for stage in manifest.get("stages") or []},
    )


def _overrides(folder: Path) -> list[str]:
    try:
        found = read_yaml(folder / ".hydra" / "overrides.yaml")
    except (OSError, ValueError):
        return []
    given = [str(item) for item in found] if isinstance(found, list) else []
    return [item for item in given if item.partition("=")[0].lstrip("+") not in _OWN_KEYS]


def lacking(recorded: Recorded, there: There) -> list[str]:
    """What W&B lacks of a run, in words."""
    said = []
    wanted_tables = {name for name in recorded.predictions if int(recorded.tracker["table_rows"]) > 0}
    rows = recorded.row_keys
    if not rows <= there.rows:
        said.append(f"{len(rows - there.rows):,} of {len(rows):,} rows")
    said += [f"the table of {name}" for name in sorted(wanted_tables - there.tables)]
    summary = there.summary or {}
    metrics = recorded.result.get("metrics") or {}
    if summary.get("status") != recorded.result.get("status") or any(name not in summary for name in metrics):
        said.append("the result")
    return said


class Server:
    """What a W&B server says of its runs, through W&B's public API.

    Raises:
        UserError: there is no key for it, or its address was not written down.
    """

    def __init__(self, tracker: Mapping[str, Any]) -> None:
        if MASK in (tracker["base_url"] or ""):
            raise UserError(
                f"The runs were recorded with tracker.base_url={tracker['base_url']}, whose credentials were not "
                "written down.",
                advice="Give --base-url with the address alone, and the key in WANDB_API_KEY or netrc.",
            )
        if not has_key(tracker["base_url"]):
            raise UserError(
                f"There is no key for {tracker['base_url'] or 'W&B'}, so nothing can be sent.",
                advice="Set WANDB_API_KEY, or put the key into netrc with `wandb login`.",
            )
        self._api = api(tracker)
        self.entity = str(tracker["entity"] or self._api.default_entity)

    def has(self, recorded: Recorded) -> There:
        """What is there of a run; nothing where it is not known."""
        run = self._find(recorded)
        if run is None:
            return There()
        summary = dict(run.summary_metrics)
        named = {name for name in recorded.predictions if table_key(name) in summary}
        whole = self._tables(run) if named else set()
        tables = frozenset(name for name in named if any(_is_table_of(one, run.id, name) for one in whole))
        return There(rows_there(run), tables, summary)

    def _find(self, recorded: Recorded) -> Any:
        from requests import RequestException
        from wandb.errors import CommError

        path = f"{self.entity}/{recorded.tracker['project']}/{run_id(recorded.info.run_id)}"
        self._api.flush()  # it would answer with what it heard before
        try:
            return self._api.run(path)
        except (CommError, ValueError, RequestException) as error:
            if "ould not find" in str(error):
                return None
            raise

    def _tables(self, run: Any) -> set[str]:
        """Names of the tables that are whole: their files arrived and they were closed."""
        return {
            str(artifact.name).partition(":")[0]
            for artifact in run.logged_artifacts()
            if artifact.type == "run_table" and artifact.state == "COMMITTED"
        }


def _is_table_of(artifact: str, run: str, benchmark: str) -> bool:
    """W&B leaves characters out of the names of tables, and adds a checksum then."""
    plain = re.sub(r"[^a-zA-Z0-9_\-.]+", "", f"run-{run}-{table_key(benchmark)}")
    return artifact == plain or re.fullmatch(re.escape(plain) + r"-[\w-]{6}", artifact) is not None


def send(recorded: Recorded, there: There, scratch: Path) -> str:
    """Sends what W&B lacks of a run.

    Args:
        recorded: What the run folder holds.
        there: What W&B has of it.
        scratch: Where the W&B client writes meanwhile.

    Returns:
        The run's address in W&B.
    """
    info = {**asdict(replace(recorded.info, run_dir=scratch)), "run_dir": str(scratch)}
    run = WandbRun(info, recorded.tracker, lambda **facts: None, there=there.rows, finish_s=FINISH_S)
    for stage, rows in recorded.stages.items():
        run.stage_started(stage, rows)
        run.stage_finished(stage, {}, recorded.reused.get(stage, False))
    metrics = recorded.result.get("metrics") or {}
    for name, path in recorded.predictions.items():
        own = {key: value for key, value in metrics.items() if key.startswith(f"{name}/")}
        roots = list(recorded.image_roots.get(name, ()))
        run.predictions(name, str(path), roots, own, is_there=name in there.tables)
    url = str(run.run.url or "")
    run.finish(recorded.result)
    return url


def bring(upload: Upload, servers: dict[tuple[str | None, str | None], Server]) -> Sent:
    """Brings W&B up to date with one run folder, and looks whether it is.

    Args:
        upload: The run folder.
        servers: Servers that were asked before; the run's own is added.
    """
    recorded = read_recorded(upload)
    place = (recorded.tracker["base_url"], recorded.tracker["entity"])
    if place not in servers:
        servers[place] = Server(recorded.tracker)
    server = servers[place]
    recorded = replace(recorded, tracker={**recorded.tracker, "entity": server.entity})
    there = server.has(recorded)
    wanted = lacking(recorded, there)
    if not wanted:
        return Sent(upload.run_dir)
    with tempfile.TemporaryDirectory(prefix="mgm-exp-wandb-") as scratch:
        for variable, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            os.environ[variable] = str(Path(scratch) / folder)
        url = send(recorded, there, Path(scratch))
    still = wanted
    for seconds in PATIENCE_S:
        time.sleep(seconds)
        still = lacking(recorded, server.has(recorded))
        if not still:
            break
    return Sent(upload.run_dir, tuple(part for part in wanted if part not in still), tuple(still), url)


# -- the two ends of the pipe ------------------------------------------------------------------------------------------


def upload_runs(uploads: Sequence[Upload]) -> Iterator[Sent]:
    """Brings W&B up to date with run folders, one after the other, in a process of its own.

    Args:
        uploads: What is to be there.

    Yields:
        What became of each, until all are done or W&B itself fails.
    """
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")) if part
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mgm_exp.record.wandb_upload", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        for upload in uploads:
            try:
                process.stdin.write(json.dumps(asdict(upload)).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it ended: what it said last says why
            line = process.stdout.readline()
            if not line:
                yield Sent(upload.run_dir, error="the W&B client's process ended unexpectedly", is_last=True)
                return
            sent = Sent(**json.loads(line))
            yield sent
            if sent.is_last:
                return
    finally:
        kill_client(process)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def serve(uploads: BinaryIO, reply: Reply) -> None:
    """Answers one line with another until there are no more, or W&B fails."""
    servers: dict[tuple[str | None, str | None], Server] = {}
    for line in uploads:
        upload = Upload(**json.loads(line))
        try:
            sent = bring(upload, servers)
        except MgmError as error:
            sent = Sent(upload.run_dir, error=str(error), is_last=not isinstance(error, DataError))
        except Exception as error:  # noqa: BLE001 - whatever a network and a client do; the person is told
            sent = Sent(upload.run_dir, error=first_line(error), is_last=True)
        reply(**asdict(sent))
        if sent.is_last:
            return


def main() -> None:
    """Serves the process whose id is the first argument."""
    die_with_parent(parent_pid=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb", buffering=0) as back:
        os.dup2(2, 1)

        def reply(**facts: Any) -> None:
            back.write(json.dumps(facts).encode() + b"\n")

        serve(sys.stdin.buffer, reply)
    # See wandb_client.main: the client would wait for its helper without a limit.
    os._exit(0)


if __name__ == "__main__":
    main()
