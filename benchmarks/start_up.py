"""What a command costs before it does anything: ``--help``, ``--cfg job``, ``status``, ``report``.

The peers: a script with the imports that training scripts have at their head, and a plain Hydra app with as many
groups, choices and keys as ours, untyped, with nothing of ours in it. CPU time of whole processes, repeats alternated,
median. The page cache is warm and the byte code is compiled: each command ran once before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measurement import Row

REPEATS, REPEATS_QUICK = 3, 1
EAGER, PLAIN = 15.0, 1 / 1.5
_HEAVY = ("torch", "transformers", "peft", "deepspeed", "wandb", "optuna", "numpy")
_APP = """\
import hydra
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None: ...

main()
"""


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures all commands in turn."""
    app = plain_app(work / "app")
    root = work / "empty"
    commands: dict[str, list[str]] = {
        "help": ["-m", "mgm_exp", "--help"],
        "cfg": ["-m", "mgm_exp", "--cfg", "job"],
        "verbs": ["-m", "mgm_exp.cli", "--help"],
        "status": ["-m", "mgm_exp.cli", "status", "--root", str(root)],
        "report": ["-m", "mgm_exp.cli", "report", "--help"],
        "plain help": [str(app), "--help"],
        "plain cfg": [str(app), "--cfg", "job"],
        "eager": ["-m", "benchmarks.peers.eager_imports", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for arguments in commands.values():
        cpu_of(arguments)
    for repeat in range(REPEATS_QUICK if quick else REPEATS):
        for name in sorted(commands, reverse=repeat % 2 == 1):
            seconds[name].append(cpu_of(commands[name]))
    cost = {name: statistics.median(values) for name, values in seconds.items()}
    how = f"CPU time of the process, median of {len(seconds['help'])} alternated repeats"
    spread = {name: f"{min(values):.2f} to {max(values):.2f} s" for name, values in seconds.items()}

    def row(what: str, ours: str, peer: str, goal: float | None) -> Row:
        evidence = f"{how}; ours {spread[ours]}, peer {spread[peer]}"
        return Row(what, "s", cost[ours], cost[peer], None if quick else goal, _imports(commands[ours]), evidence)

    return [
        row("--help, and eager imports", "help", "eager", EAGER),
        row("--cfg job, and eager imports", "cfg", "eager", None),
        row("--help, and a plain Hydra app's", "help", "plain help", PLAIN),
        row("--cfg job, and a plain Hydra app's", "cfg", "plain cfg", PLAIN),
        row("mgm-exp --help, and a plain Hydra app's", "verbs", "plain help", PLAIN),
        row("mgm-exp status, and a plain Hydra app's --help", "status", "plain help", PLAIN),
        row("mgm-exp report --help, and a plain Hydra app's", "report", "plain help", PLAIN),
    ]


def cpu_of(arguments: Sequence[str]) -> float:
    """CPU seconds of a Python process and all that it waited for."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def plain_app(folder: Path) -> Path:
    """An app on Hydra alone: our groups and choices as files, and the schema's keys as a file of values."""
    import yaml

    from mgm_exp.bootstrap import CONF
    from mgm_exp.compose import compose
    from mgm_exp.config import plain

    conf = folder / "conf"
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "__pycache__"))
    for group in groups:
        (conf / group.name).mkdir(parents=True)
        for choice in sorted(group.glob("*.yaml")):
            # What one choice says of others (defaults lists, packages) belongs to ours
            values = yaml.safe_load(choice.read_text(encoding="utf-8")) or {}
            kept = {key: value for key, value in values.items() if key != "defaults"}
            (conf / group.name / choice.name).write_text(yaml.safe_dump(kept), encoding="utf-8")
    chosen = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = [item for item in chosen if isinstance(item, dict) and next(iter(item)) in {path.name for path in groups}]
    (conf / "values.yaml").write_text(yaml.safe_dump(plain(compose([]))), encoding="utf-8")
    (conf / "config.yaml").write_text(yaml.safe_dump({"defaults": ["values", "_self_", *chosen]}), encoding="utf-8")
    (folder / "app.py").write_text(_APP, encoding="utf-8")
    return folder / "app.py"


def _imports(command: Sequence[str]) -> str:
    """Which heavy packages our command loads: none should."""
    code = f"import runpy, sys\nsys.argv = {list(command[1:])!r}\n"
    code += f"try: runpy.run_module({command[1]!r}, run_name='__main__', alter_sys=True)\nexcept SystemExit: pass\n"
    code += f"sys.stderr.write('LOADED ' + ' '.join(n for n in {_HEAVY!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stderr.rpartition("LOADED ")[2].strip()
    return f"it loads {loaded}: DIFFERENT from what is promised" if loaded else "no heavy package is loaded"
