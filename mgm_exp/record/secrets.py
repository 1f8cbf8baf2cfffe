"""Keeps secrets out of everything that is written: configs, manifests, diffs, logs, tracker.

A secret is recognised by what holds it (a key such as ``api_key``), by its value (what a secret environment variable
of this process holds) or by its shape (``token=<20 or more characters>``, credentials inside URLs). Only text is ever
replaced: ``use_cls_token: true``, ``num_memory_tokens: 8`` and ``max_new_tokens: 12`` stay as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

MASK = "***"

# The last words of names whose text is a secret whatever it looks like.
_SECRET_WORDS = frozenset(
    "apikey password passwd passphrase secret secrets credential credentials authorization".split()
)
# "api_key" is one, "sort_key" is not; "hf_token" is one and a bare "token", "pad_token" and "cls_token" are not.
_SECRET_KEYS = frozenset("api access secret private auth encryption signing".split())
_SECRET_TOKENS = frozenset(
    "auth access api hf hub huggingface github gh gitlab slack bot bearer refresh session secret wandb openai user "
    "login registry pypi".split()
)
_SECRET_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_ID)?$", re.IGNORECASE)
# Shorter values of secret variables would match ordinary words of a log.
_SHORTEST_VALUE = 8
_SHAPES = (
    # Addresses that are secrets themselves: whoever knows one can write there.
    (
        re.compile(r"(?i)(\bhttps?://hooks\.slack\.com/(?:services|workflows|triggers)/)[A-Za-z0-9/_\-]{8,}"),
        rf"\g<1>{MASK}",
    ),
    (re.compile(r"(?i)(\bhttps?://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/)[\w/\-]{8,}"), rf"\g<1>{MASK}"),
    (re.compile(r"(?i)(\bhttps?://[\w.\-]+\.webhook\.office\.com/)[\w/@\-]{8,}"), rf"\g<1>{MASK}"),
    (re.compile(r"(?i)(\bhttps?://open\.(?:feishu|larksuite)\.\w+/open-apis/bot/v2/hook/)[\w\-]{8,}"), rf"\g<1>{MASK}"),
    (
        # But for addresses that only name variables of the environment (alerts.urls)
        re.compile(
            r"(?i)(\b(?:slack|discord|tgram|dingtalk|feishu|wecombot|msteams)://)"
            r"(?!(?:\$[a-z_]\w*[/:@]*)+(?:[\s\"'`?#,;)\]]|$))[^\s\"']{8,}"
        ),
        rf"\g<1>{MASK}",
    ),
    (
        re.compile(r"(?i)(\bmailtos?://)(?![^\s\"'/:@]*:\$[a-z_]\w*@)[^\s\"'/]{8,}[^\s\"']*"),
        rf"\g<1>{MASK}",
    ),
    (
        re.compile(
            r"(?i)(\bhttps?://[^\s\"'?]+\?(?:[^\s\"'&]*&)*(?:key|access_token|token|api_?key|secret|sig|signature)=)[^\s\"'&]{8,}"
        ),
        rf"\g<1>{MASK}",
    ),
    # --api-key=..., token: ..., "password": "...". Twenty characters and more, as real keys have.
    (
        re.compile(r"(?i)((?:api[_-]?key|token|secret|password|passwd)\W{1,4})[A-Za-z0-9_\-]{20,}[A-Za-z0-9_\-.=/+]*"),
        rf"\g<1>{MASK}",
    ),
    (
        re.compile(r"(?i)(\b[a-z][a-z0-9+.\-]*://)(?!(?:[^\s/@:]*:)?\$[a-z_]\w*@)[^\s/@:]+(?::[^\s/@]*)?@"),
        rf"\g<1>{MASK}@",
    ),
    (re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9_\-.=/+]{16,}"), rf"\g<1>{MASK}"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abprs]-|AKIA)[A-Za-z0-9_\-]{16,}"), MASK),
)


def secret_advice(key: str) -> str:
    """What to do instead of writing a secret into a key of the configuration."""
    if key.startswith("alerts.urls"):
        return (
            "Name a variable of the environment in its place, as in 'alerts.urls=[slack://$SLACK_A/$SLACK_B/$SLACK_C]'."
        )
    return "Put it into the environment instead (WANDB_API_KEY, HF_TOKEN)."


def is_secret_name(name: str) -> bool:
    """Whether a key, an option or a header of this name holds a secret."""
    words = re.split(r"[_-]+", re.split(r"[./]", name.strip().lower())[-1].strip("_-"))
    before = words[-2] if len(words) > 1 else None
    if words[-1] == "key":
        return before in _SECRET_KEYS
    if words[-1] == "token":
        return before is None or before in _SECRET_TOKENS
    return words[-1] in _SECRET_WORDS


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _SECRET_VARIABLE.search(name) is not None


def secret_values() -> tuple[str, ...]:
    """The values of this process's secret environment variables, longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE and not value.startswith(("/", "~"))
    }
    return tuple(sorted(values, key=len, reverse=True))


def redact_text(text: str, values: tuple[str, ...] | None = None) -> str:
    """The text with every secret replaced by ``***``.

    Args:
        text: Any text: a log line, a diff, a command.
        values: What :func:`secret_values` gave, where many texts are redacted in a row.
    """
    for value in secret_values() if values is None else values:
        if value in text:
            text = text.replace(value, MASK)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def redact(obj: Any) -> Any:
    """A copy of plain data (dicts, lists, scalars) without secrets; paths become text, other types stay.

    Command-line overrides are text of the form ``key=value``: one with a secret key loses its value.
    """
    return _redact(obj, secret_values())


def _redact(obj: Any, values: tuple[str, ...]) -> Any:
    if isinstance(obj, str):
        return _redact_override(redact_text(obj, values))
    if isinstance(obj, PurePath):
        return redact_text(str(obj), values)
    if isinstance(obj, Mapping):
        return {
            key: MASK if isinstance(value, str) and value and is_secret_name(str(key)) else _redact(value, values)
            for key, value in obj.items()
        }
    if isinstance(obj, (list, tuple)):
        return [_redact(item, values) for item in obj]
    return obj


def _redact_override(text: str) -> str:
    name, equals, value = text.partition("=")
    if equals and value and not any(mark in name for mark in " \n\t") and is_secret_name(name.lstrip("+~-")):
        return f"{name}={MASK}"
    return text
