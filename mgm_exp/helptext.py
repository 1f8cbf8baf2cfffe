"""``python -m mgm_exp --help``: the template of ``conf/config.yaml`` with every group's choices, without composing."""

from __future__ import annotations

import string

import yaml

from mgm_exp.bootstrap import CONF, SWEEPS

_WIDTH = 108


def help_text() -> str:
    """What ``--help`` prints."""
    with open(CONF / "config.yaml", encoding="utf-8") as file:
        shown = yaml.safe_load(file)["hydra"]["help"]
    text = str(shown["template"]).replace("${hydra.help.header}", str(shown["header"]))
    return string.Template(text).safe_substitute(APP_CONFIG_GROUPS=groups_text())


def groups_text() -> str:
    """Every group, its choices, and what the first line of each choice's file says."""
    lines = []
    folders = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "__pycache__"))
    for folder in [*folders, SWEEPS]:
        group = f"+{folder.name}" if folder == SWEEPS else folder.name
        for number, file in enumerate(sorted(folder.glob("*.yaml"))):
            says = _first_comment(file.read_text(encoding="utf-8"))
            line = f"  {group if number == 0 else '':<11} {file.stem:<17} {says}"
            lines.append(line if len(line) <= _WIDTH else line[: _WIDTH - 3].rsplit(" ", 1)[0] + " ...")
    return "\n".join(lines) + "\n"


def _first_comment(text: str) -> str:
    for line in text.splitlines():
        if line.startswith("# @"):
            continue
        return line.lstrip("# ").removeprefix("Asks:").strip() if line.startswith("#") else ""
    return ""
