"""What the runs were trained on, and what it takes to have them again: settings, code, packages, seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgm_exp import page
from mgm_exp.compare.datasets import COLUMNS, data_rows
from mgm_exp.compare.differences import differing_keys, shown
from mgm_exp.compare.html.view import View
from mgm_exp.compare.runs import Run
from mgm_exp.page import Column, Html, join

_STAGES = {"align": "Captions (align stage)", "instruct": "Conversations (instruct stage)"}
_MOST_COLUMNS = 8
_LONGEST = 60


def data(view: View) -> Html | None:
    """What both stages were trained on, side by side; None where no run kept ``data.json``."""
    found = view.comparison["data"]
    if not found:
        return None
    blocks: list[Html] = []
    for stage, title in _STAGES.items():
        rows = [[row[column] for column in COLUMNS] for row in data_rows(found, stage)]
        columns = [Column(column, is_number=k > 0) for k, column in enumerate(COLUMNS)]
        blocks.append(page.subsection(title, page.table(columns, rows, name=title), *_losses(found, stage)))
    named = [
        (entry["name"], f"{entry['fingerprint'][:16]}: " + ", ".join(view.label(name) for name in entry["runs"]))
        for entry in found
    ]
    blocks.append(page.details("Which runs, and the fingerprints of the data", page.definitions(named)))
    blocks.append(
        page.note(
            "MATTR-50 is the share of different words in 50 in a row, TTR that of the first words of all; both are "
            "compared at equal lengths only, with 95 % intervals."
        )
    )
    return page.section("Data", *blocks, anchor="data")


def _losses(found: Sequence[Mapping[str, Any]], stage: str) -> list[Html]:
    """What was dropped, rejected or written anew on the way, where anything was."""
    said = []
    for entry in found:
        part = entry[stage]
        facts = [f"{count:,} dropped by {name}" for name, count in part["dropped"].items() if count]
        if part["rejected"]:
            facts.append(f"{part['rejected']:,} could not be used")
        if part["recaptioned"]:
            facts.append(f"{part['recaptioned']:,} captions written anew")
        if facts:
            said.append(page.note(f"{entry['name']}: {', '.join(facts)}."))
    return said


# -- to have them again ------------------------------------------------------------------------------------------------


def reproducibility(view: View) -> Html:
    """Configuration differences, evaluation keys, code, packages, seeds, commands."""
    return page.section(
        "To have it again",
        *_configurations(view),
        *_versions(view),
        page.details("Seeds, times, fingerprints", _origins(view)),
        *_evaluation(view),
        *_packages(view),
        anchor="reproducibility",
    )


def _configurations(view: View) -> list[Html]:
    known = [(entry, run) for entry in view.entries if (run := view.run(entry["run_dir"])) and run.config]
    if not known:
        return [page.paragraph("No run kept its configuration.")]
    keys = differing_keys([run.config for _, run in known])
    if not keys:
        return [page.paragraph("All runs have the same configuration.")]
    if len(known) <= _MOST_COLUMNS:
        columns = [Column("setting"), *(Column(entry["label"]) for entry, _ in known)]
        rows = [[key, *(_cut(shown(run.config.get(key))) for _, run in known)] for key in keys]
    else:
        columns = [Column("run"), *(Column(key) for key in keys)]
        rows = [[entry["label"], *(_cut(shown(run.config.get(key))) for key in keys)] for entry, run in known]
    n_same = len({key for _, run in known for key in run.config}) - len(keys)
    return [
        page.subsection(
            "Settings that differ",
            page.table(columns, rows, name="Settings that differ"),
            page.note(f"{n_same} other settings are the same for all runs."),
        )
    ]


def _versions(view: View) -> list[Html]:
    """Code and machine: once where all runs share them, each value with its runs where not."""
    groups: dict[str, dict[str, list[str]]] = {}
    for entry in view.entries:
        run = view.run(entry["run_dir"])
        if run is None or not run.manifest:
            continue
        for what, value in _environment(run).items():
            groups.setdefault(what, {}).setdefault(value, []).append(entry["label"])
    rows = [
        (what, join([_told(value, labels, is_one=len(values) == 1) for value, labels in values.items()], "; "))
        for what, values in groups.items()
    ]
    return [page.subsection("Code, machine, command", page.definitions(rows))] if rows else []


def _told(value: str, labels: Sequence[str], *, is_one: bool) -> str:
    more = f" and {len(labels) - _MOST_COLUMNS} more" if len(labels) > _MOST_COLUMNS else ""
    return value if is_one else f"{value} ({', '.join(labels[:_MOST_COLUMNS])}{more})"


def _environment(run: Run) -> dict[str, str]:
    git, device = run.manifest.get("git"), run.manifest.get("device")
    found = {}
    if isinstance(git, Mapping):
        state = ", with changes that are not committed" if git.get("dirty") is True else ""
        found["git"] = f"{git.get('commit') or 'unknown'}{state}"
    found["python"] = str(run.manifest.get("python") or "unknown")
    found["platform"] = str(run.manifest.get("platform") or "unknown")
    if isinstance(device, Mapping):
        found["device"] = f"{device.get('count') or 1} x {device.get('name') or device.get('type')}"
        if device.get("cuda"):
            found["device"] += f", CUDA {device['cuda']}, driver {device.get('driver')}"
    command = run.manifest.get("command")
    if isinstance(command, list):
        found["command"] = " ".join(map(str, command))
    return found


def _origins(view: View) -> Html:
    columns = [Column(title) for title in ("run", "seed", "started (UTC)", "config hash", "data", "model", "stages")]
    rows = []
    for entry in view.entries:
        run = view.run(entry["run_dir"])
        manifest = run.manifest if run else {}
        stages = manifest.get("stages")
        named = [str(stage.get("name")) for stage in stages if isinstance(stage, Mapping)] if stages else []
        reused = sum(bool(stage.get("reused")) for stage in stages if isinstance(stage, Mapping)) if stages else 0
        rows.append(
            [
                entry["label"],
                ", ".join(map(str, entry["seeds"])) or "-",
                str(manifest.get("started_at") or "-")[:19].replace("T", " "),
                str(manifest.get("config_hash") or "-")[:12],
                _fingerprint(manifest.get("data")),
                _fingerprint(manifest.get("model")),
                f"{len(named)}, {reused} from the store" if named else "-",
            ]
        )
    return page.table(columns, rows, name="Seeds, times, fingerprints")


def _fingerprint(part: Any) -> str:
    if not isinstance(part, Mapping):
        return "-"
    return f"{part.get('name')} {str(part.get('fingerprint') or '')[:12]}".strip()


def _evaluation(view: View) -> list[Html]:
    """Under which evaluation key each benchmark was answered."""
    rows = []
    for benchmark in view.comparison["benchmarks"]:
        keys: dict[str, list[str]] = {}
        for entry in view.entries:
            run = view.run(entry["run_dir"])
            key = run.eval_keys.get(benchmark) if run else None
            if key:
                told = ", ".join(f"{name} {shown(value)}" for name, value in key.items())
                keys.setdefault(told, []).append(entry["label"])
        rows += [(benchmark, _told(told, labels, is_one=len(keys) == 1)) for told, labels in keys.items()]
    return [page.details("Evaluation keys", page.definitions(rows))] if rows else []


def _packages(view: View) -> list[Html]:
    """Packages that are not the same everywhere, and the whole list of the first run."""
    known = [
        (entry, dict(found))
        for entry in view.entries
        if (run := view.run(entry["run_dir"])) and isinstance(found := run.manifest.get("packages"), Mapping)
    ]
    if not known:
        return []
    blocks = []
    keys = differing_keys([found for _, found in known])
    if keys:
        columns = [Column("package"), Column("versions")]
        rows = []
        for key in sorted(keys):
            versions: dict[str, list[str]] = {}
            for entry, found in known:
                versions.setdefault(str(found.get(key, "not installed")), []).append(entry["label"])
            rows.append([key, "; ".join(f"{version} ({', '.join(labels)})" for version, labels in versions.items())])
        blocks.append(page.subsection("Packages that differ", page.table(columns, rows, name="Packages that differ")))
    first = known[0][1]
    listed = "\n".join(f"{name}=={version}" for name, version in sorted(first.items()))
    name = "all runs" if not keys else known[0][0]["label"]
    blocks.append(page.details(f"{len(first)} packages of {name}", page.code(listed)))
    return blocks


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
