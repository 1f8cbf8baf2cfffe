"""``mgm-exp wandb-sync DIR...``: brings W&B up to date with runs that were made offline or cut short on the way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_DONE, EXIT_FAILED
from mgm_exp.signals import stop_on_signals

if TYPE_CHECKING:
    from mgm_exp.compare import Run
    from mgm_exp.record.wandb_upload import Sent, Upload


def run(arguments: list[str]) -> int:
    """Sends what the arguments name: 0, or 1 where something is still lacking."""
    options = _options(arguments)
    from mgm_exp.compare import load_runs
    from mgm_exp.compare.wording import short_folders
    from mgm_exp.record.wandb_upload import upload_runs

    given = {"project": options.project, "entity": options.entity, "base_url": options.base_url}
    tracker = {key: value for key, value in given.items() if value is not None}
    runs = load_runs(options.folders)
    names = dict(zip((run.name for run in runs), short_folders([run.name for run in runs])[1], strict=True))
    ready = [one for one in runs if one.status != "running"]
    n_problems = 0
    n_answers = 0
    with stop_on_signals():
        for one in runs:
            if one.status == "running":
                print(f"{names[one.name]}: still runs; send it when it has ended", flush=True)
        for sent in upload_runs([upload_of(one, tracker) for one in ready]):
            print(f"{names[ready[n_answers].name]}: {_told(sent)}", flush=True)
            n_answers += 1
            n_problems += bool(sent.error or sent.lacking)
    left = len(ready) - n_answers
    if left:
        print(f"{left} more not tried; the same command continues.")
    return EXIT_FAILED if n_problems or left else EXIT_DONE


def upload_of(run: Run, tracker: dict[str, str]) -> Upload:
    """What is sent of a run, with the folders that its images may lie in."""
    from mgm_exp.compare.html.answers import image_roots
    from mgm_exp.record.wandb_upload import Upload

    roots = {name: [str(root) for root in image_roots(run, name)] for name in run.eval_keys}
    return Upload(str(run.path), roots, tracker)


def _told(sent: Sent) -> str:
    if sent.error:
        return f"not sent: {sent.error}"
    if sent.lacking:
        return f"sent, but W&B does not show {_listed(sent.lacking)}; the same command tries again: {sent.url}"
    return f"sent and found there: {_listed(sent.sent)}: {sent.url}" if sent.sent else "is there already"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp wandb-sync",
        description="Sends to W&B what it lacks of runs, from the files in their folders: all of an offline run, the "
        "rest of one that lost its network. Afterwards W&B is asked whether it has everything. What is there is not "
        "sent again. The key comes from WANDB_API_KEY or netrc.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders and sweep folders")
    parser.add_argument("--project", metavar="NAME", help="W&B project (default: tracker.project of each run)")
    parser.add_argument("--entity", metavar="NAME", help="W&B team or user (default: tracker.entity, else the key's)")
    parser.add_argument("--base-url", metavar="URL", help="W&B server (default: tracker.base_url, else the client's)")
    return parser.parse_args(arguments)
