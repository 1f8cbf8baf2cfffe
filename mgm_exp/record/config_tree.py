"""Shows a configuration as a tree, one branch for each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from mgm_exp.config import plain
from mgm_exp.record.secrets import redact


def config_tree(config: Any, console: Console | None = None) -> Tree:
    """Prints the configuration as a tree, without secrets.

    Args:
        config: An ``ExperimentConfig``, one of its sections, or what ``plain`` made of it.
        console: Where it is printed. None: standard output, at least 120 columns wide where it is not a terminal.

    Returns:
        The tree that was printed.
    """
    values = redact(plain(config))
    tree = Tree(Text(str(values.get("name", "config")), style="bold"), guide_style="dim")
    _grow(tree, {key: value for key, value in values.items() if key != "name"})
    if console is None:
        console = Console(soft_wrap=False)
        if not console.is_terminal:
            console = Console(width=120)
    console.print(tree)
    return tree


def _grow(branch: Tree, values: Mapping[str, Any]) -> None:
    """Scalars of a group share its lines, groups get branches: the whole fits a screen."""
    leaves = Text()
    for key, value in values.items():
        if isinstance(value, Mapping):
            continue
        leaves.append("  " if leaves else "")
        leaves.append(f"{key}=", style="dim")
        leaves.append(_shown(value), style="cyan")
    if leaves:
        branch.add(leaves)
    for key, value in values.items():
        if not isinstance(value, Mapping):
            continue
        name = value.get("name")
        title = Text(key, style="bold")
        if name is not None:
            title.append(f" = {name}", style="green")
        _grow(branch.add(title), {inner: item for inner, item in value.items() if inner != "name"})


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_shown(item) for item in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
