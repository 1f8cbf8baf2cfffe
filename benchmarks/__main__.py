"""Runs benchmarks, each in a process of its own, and writes ``benchmarks/results.json`` and a table.

python -m benchmarks                       # all but the long ones; 15 to 20 minutes on two idle cores
python -m benchmarks --all                 # the long ones, too
python -m benchmarks data_validation       # one; the rows of the others stay as they are
python -m benchmarks --quick               # small data: whether it runs, not how fast; nothing is written
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measurement import is_missed, is_out_of_reach
from mgm_exp.store import read_json, usable_cores, write_atomic, write_json_atomic

BENCHMARKS = (
    "start_up",
    "sweep_trainer",
    "ablation_grid",
    "train_loop",
    "data_text_statistics",
    "data_recaptioning",
    "data_validation",
    "data_memory",
    "plan_memory",
    "model_mining",
    "train_head",
    "feature_cache",
    "monitoring",
    "merge_memory",
    "warm_start",
    "sweep_overhead",
    "sweep_pruning",
    "sweep_rungs",
    "sweep_kills",
    "evaluate_throughput",
    "evaluate_adapters",
    "compare_runs",
    "checkpoint_delay",
    "pack",
    "scale_study",
    "scale_sweep",
    "scale_store",
    "scale_slurm",
)
# Minutes each; `make bench-all` runs them, or their name does.
LONG = (
    "data_text_statistics",
    "data_recaptioning",
    "data_validation",
    "data_memory",
    "plan_memory",
    "merge_memory",
    "warm_start",
    "sweep_overhead",
    "sweep_pruning",
    "sweep_rungs",
    "sweep_kills",
    "evaluate_adapters",
    "compare_runs",
    "checkpoint_delay",
    "scale_study",
    "scale_sweep",
    "scale_store",
    "scale_slurm",
)
# They take one core each, and their ratios are of processor time: after the others, two of them run at a time. The
# longest comes first.
ONE_CORE = (
    "model_mining",
    "evaluate_throughput",
    "start_up",
    "feature_cache",
    "train_head",
    "monitoring",
)
RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
COMPARED = ("torch", "transformers", "peft", "accelerate", "deepspeed", "optuna", "hydra-core", "py-data-juicer")
# One thread a process: what is compared is work, not who takes more cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# As the Makefile has it: in the folder of all projects, a build that was killed is waited for without end.
EXTENSIONS = {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions")}


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks ARGUMENTS``: 0; 1 if one failed, a result is wrong or a goal within reach is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Runs benchmarks, side by side.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)} (default: the short)"
    )
    parser.add_argument("--all", action="store_true", help=f"the long ones, too: {', '.join(LONG)}")
    parser.add_argument("--quick", action="store_true", help="small data, nothing is written")
    parser.add_argument("--work", type=Path, help="folder for the data (default: a temporary one)")
    parser.add_argument("--alone", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if options.alone is not None:
        return _alone(options.names[0], options.work, options.quick, options.alone)
    names = options.names or [name for name in BENCHMARKS if options.all or name not in LONG]
    found: dict[str, list[dict[str, Any]]] = {}
    failed: list[str] = []
    for name, took in _each(names, options.work, options.quick):
        if isinstance(took, Failed):  # the others go on
            failed.append(name)
            print(f"{name} failed:\n{took}", file=sys.stderr, flush=True)
            continue
        found[name] = took.rows
        print(f"{name}:", flush=True)
        _show(took.rows)
        print(f"  took {took.seconds:.0f} s, {took.cpu_seconds:.0f} CPU s", flush=True)
        if not options.quick:  # each at once: what was measured is not lost with what comes after it
            _write(name, took)
    if not options.quick:
        for line in _table(read_json(RESULTS)["rows"]):
            print(line)
        print(f"written: {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")
    if failed:
        print(f"failed: {', '.join(failed)}; their rows are those of a run before", file=sys.stderr)
    rows = [row for rows in found.values() for row in rows]
    is_wrong = any("DIFFER" in row["exactness"] for row in rows)
    return int(bool(failed) or is_wrong or (not options.quick and any(map(is_missed, rows))))


@dataclass(frozen=True)
class Took:
    """What a benchmark found, and what it took itself: wall seconds, and CPU seconds of all its processes."""

    rows: list[dict[str, Any]]
    seconds: float
    cpu_seconds: float


class Failed(RuntimeError):
    """A benchmark that ended with an error; what it printed last."""


def _each(names: Sequence[str], work: Path | None, quick: bool) -> Iterator[tuple[str, Took | Failed]]:
    """Each benchmark when it is over."""
    run = partial(_in_a_process, work=work, quick=quick)
    beside = [name for name in ONE_CORE if name in names]
    for name in names:
        if name not in beside:
            print(f"{name} ...", flush=True)
            yield name, run(name)
    with ThreadPoolExecutor(min(2, usable_cores())) as cores:
        if beside:
            print(f"{', '.join(beside)} ...", flush=True)
        under_way = {cores.submit(run, name): name for name in beside}
        try:
            for done in as_completed(under_way):
                yield under_way[done], done.result()
        finally:
            cores.shutdown(wait=True, cancel_futures=True)


def _in_a_process(name: str, work: Path | None, quick: bool) -> Took | Failed:
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=work) as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks", name, "--work", folder, "--alone", str(out)]
        with open(Path(folder) / "log.txt", "w+", encoding="utf-8") as log:
            began = time.monotonic()
            process = subprocess.Popen(
                [*command, *(["--quick"] if quick else [])],
                env={**EXTENSIONS, **os.environ, **ONE_THREAD},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            _, status, used = os.wait4(process.pid, 0)  # with what it used, and what it has waited for
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - began
            if process.returncode:
                log.seek(0)
                return Failed(log.read()[-5000:])
        return Took(read_json(out), seconds, used.ru_utime + used.ru_stime)


def _alone(name: str, work: Path, quick: bool, out: Path) -> int:
    """One benchmark in this process."""
    data = work / "data"
    data.mkdir()
    rows = importlib.import_module(f"benchmarks.{name}").run(data, quick)
    out.write_text(json.dumps([{"benchmark": name, **row.to_json()} for row in rows]), encoding="utf-8")
    return 0


def _write(name: str, took: Took) -> None:
    """A benchmark's rows in place of its old ones, in the order of the benchmarks, and what it took; the table, too."""
    before = read_json(RESULTS) if RESULTS.exists() else {"rows": []}
    kept = [row for row in before["rows"] if row["benchmark"] in set(BENCHMARKS) - {name}]
    rows = sorted([*kept, *took.rows], key=lambda row: BENCHMARKS.index(row["benchmark"]))
    seconds = {"seconds": round(took.seconds, 1), "cpu_seconds": round(took.cpu_seconds, 1)}
    known = {key: {**before.get(key, {}), name: value} for key, value in seconds.items()}
    ordered = {key: {name: all_[name] for name in BENCHMARKS if name in all_} for key, all_ in known.items()}
    write_json_atomic(RESULTS, {"schema_version": 1, "machine": _machine(), **ordered, "rows": rows})
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    table = "\n".join(_table(rows))
    write_atomic(README, f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of Markdown."""
    lines = ["| what | ours | peer | ratio | goal | same results? |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:.2f} ({_verdict(row, '**missed**')})"
        numbers = f"{row['ours']:.2f} {row['unit']} | {row['peer']:.2f} {row['unit']} | {row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {numbers} | {goal} | {row['exactness']} |")
    return lines


def _verdict(row: dict[str, Any], missed: str) -> str:
    """What became of a row's goal, in words."""
    if row["met"]:
        return "met"
    return f"out of reach: {row['most']:.2f} at most" if is_out_of_reach(row) else missed


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in COMPARED},
        "load": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        goal = "" if row["goal"] is None else f" (goal {row['goal']:.1f}: {_verdict(row, 'MISSED')})"
        print(f"  {row['name']}: {row['ours']:.2f} {row['unit']}, peer {row['peer']:.2f}: {row['ratio']:.1f} x{goal}")
        print(f"    {row['exactness']}\n    {row['evidence']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
