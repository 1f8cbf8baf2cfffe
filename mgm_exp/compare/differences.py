"""What differs between runs: the settings, the shortest label that tells runs apart, and what is confounded.

A label names the choices that were made (``lora_r16``); settings that follow from a choice (rank, alpha) are not
repeated in it. A setting outside of the choice that changes along with it (the learning rate of full fine-tuning and
of LoRA) is confounded: the comparison cannot tell which of the two did it, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgm_exp.compare.runs import Run

Settings = Mapping[str, Any]

_SECTIONS = ("model", "data", "adapter", "zero", "train", "eval")
_SOFTWARE = ("torch", "transformers", "peft", "deepspeed", "mgm_exp")


def differing_keys(settings: Sequence[Settings]) -> list[str]:
    """Keys whose values are not the same everywhere."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]


def choices(settings: Sequence[Settings]) -> list[str]:
    """The fewest differing keys that tell everything: names of groups first, then what they do not determine."""
    differing = differing_keys(settings)
    names = [f"{section}.name" for section in _SECTIONS if f"{section}.name" in differing]
    chosen: list[str] = []
    for key in [*names, *(key for key in differing if key not in names)]:
        if not _follows(key, chosen, settings):
            chosen.append(key)
    return chosen


def confounded(settings: Sequence[Settings], chosen: Sequence[str]) -> dict[str, list[str]]:
    """Differing keys outside of the chosen groups that change along with a choice: key -> the choices it follows."""
    own = {key.split(".")[0] for key in chosen if key.endswith(".name")}
    found = {}
    for key in differing_keys(settings):
        if key in chosen or key.split(".")[0] in own:
            continue
        found[key] = [choice for choice in chosen if _follows(key, [choice], settings)] or list(chosen)
    return found


def _follows(key: str, from_keys: Sequence[str], settings: Sequence[Settings]) -> bool:
    """Whether runs that agree in ``from_keys`` agree in ``key`` too."""
    seen: dict[tuple[str, ...], str] = {}
    for one in settings:
        group = tuple(repr(one.get(other)) for other in from_keys)
        if seen.setdefault(group, repr(one.get(key))) != repr(one.get(key)):
            return False
    return True


def labels(runs: Sequence[Run]) -> list[str]:
    """A short and unique label for each run."""
    if all(run.params for run in runs):
        # A sweep: what it varied says it best. Values that are the same everywhere are left out.
        swept = [run.params for run in runs]
        keys = differing_keys(swept) or list(swept[0])
        found = [" ".join(_word(key, run.params.get(key)) for key in keys if key in run.params) for run in runs]
    elif all(run.config for run in runs) and len(runs) > 1:
        keys = choices([run.config for run in runs])
        found = [" ".join(_word(key, run.config.get(key)) for key in keys) for run in runs]
    else:
        found = [str(run.config.get("adapter.name") or run.path.name) for run in runs]
    return [
        label if label and found.count(label) == 1 else f"{label} ({_folder(run)})".strip()
        for label, run in zip(found, runs, strict=True)
    ]


def _folder(run: Run) -> str:
    """What tells equal runs apart: the trial's number in a sweep, else the end of the path."""
    if run.params and run.path.name.isdecimal():
        return f"trial {run.path.name}"
    return "/".join(run.path.resolve().parts[-2:])


def _word(key: str, value: Any) -> str:
    """``lora_r8`` for a group's choice, ``lr=0.001`` for a setting."""
    last = key.removesuffix(".name").split(".")[-1]
    is_choice = key.endswith(".name") or "." not in key
    if is_choice and isinstance(value, str) and not value.replace(".", "").isdigit():
        return shown(value)
    return f"{last}={shown(value)}"


def shown(value: Any) -> str:
    """A setting's value as it is written on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(shown(item) for item in value) + "]"
    return " ".join(str(value).split())  # one line, whatever it holds


def environment_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Code, package versions and device where they are not the same for all runs."""
    facts = [_environment(run) for run in runs if run.manifest]
    return {key: sorted({shown(one.get(key)) for one in facts}) for key in differing_keys(facts)}


def _environment(run: Run) -> dict[str, Any]:
    git, packages = run.manifest.get("git"), run.manifest.get("packages")
    device = run.manifest.get("device")
    found = {name: version for name, version in (packages or {}).items() if name in _SOFTWARE}
    if isinstance(git, Mapping):
        found |= {"git.commit": str(git.get("commit"))[:10], "git.dirty": git.get("dirty")}
    found["python"] = run.manifest.get("python")
    found["device"] = device.get("type") if isinstance(device, Mapping) else device
    return found
