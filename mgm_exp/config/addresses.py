"""Addresses of ``alerts.urls``: keys stand in the environment, and an address only names its variables.

    slack://$SLACK_A/$SLACK_B/$SLACK_C        $ALERT_URL        json://127.0.0.1:9000/alerts

So a configuration, a run's folder, a log and a tracker never hold a key: variables are put in where a message is sent,
and an address with a key written out is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
# What variables are called that go to a server whose name stands in the configuration.
OWN = "ALERT"
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<place>[^?#]*)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
# Web servers and mail: a host, a path and a user's name are no secrets there.
_WEB = ("json", "jsons", "xml", "xmls", "form", "forms")
_MAIL = ("mailto", "mailtos")
# Keys of a query whose values are secrets.
_SECRET = re.compile(r"(?:key|token|secret|sig|signature|pass|password|pwd|auth(?:orization)?|cred\w*)$", re.IGNORECASE)
# Long words of letters and digits are keys rather than names.
_LONG = re.compile(r"(?=[A-Za-z0-9_-]*[0-9])(?=[A-Za-z0-9_-]*[A-Za-z])[A-Za-z0-9_-]{16,}")


def variables_of(address: str) -> tuple[str, ...]:
    """Names of the environment variables that an address names, each once."""
    return tuple(dict.fromkeys(VARIABLE.findall(address)))


def address_fault(address: str) -> str | None:
    """What is wrong with an address, in words that repeat nothing of it; None: nothing."""
    if VARIABLE.fullmatch(address):
        return None
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return "is no address: SCHEME://..., such as slack://$A/$B/$C or json://HOST:PORT/PATH, or a variable $NAME"
    scheme, place, rest = found["scheme"].lower(), found["place"], found["rest"]
    literal = f"{scheme}:// holds a key in clear text: write it as a variable of the environment, such as $ALERT_KEY"
    user, _, _ = place.rpartition("@")
    password = user.partition(":")[2]
    if password and not VARIABLE.fullmatch(password):
        return literal
    for pair in re.split(r"[?&#]", rest):
        name, _, value = pair.partition("=")
        if value and _SECRET.search(name) and not VARIABLE.fullmatch(value):
            return literal
    if _LONG.search(VARIABLE.sub("", place + rest)):
        return literal
    if scheme in _WEB or scheme in _MAIL:
        # Else a preset of somebody else's could send W&B's key to a server of theirs
        foreign = [name for name in variables_of(address) if not name.startswith(OWN)]
        told = ", ".join(f"${name}" for name in foreign)
        return f"{scheme}:// names a server: give it variables that begin with {OWN}, not {told}" if foreign else None
    if re.sub(r"[/:@,]", "", VARIABLE.sub("", place)):
        return (
            f"{scheme}:// addresses are made of keys: write what stands before ? as variables of the environment "
            f"({scheme}://$A/$B), or the whole address as one ($ALERT_URL)"
        )
    return None


def expanded_address(address: str, environ: Mapping[str, str]) -> str:
    """The address with its variables put in; never to be written anywhere.

    Raises:
        KeyError: of the first variable that is not there, or empty.
    """

    def value(found: re.Match[str]) -> str:
        text = environ.get(found[1])
        if not text:
            raise KeyError(found[1])
        before, after = address[: found.start()], address[found.end() :]
        is_password = after.startswith("@") and ":" in before.rpartition("//")[2]
        return quote(text, safe="") if is_password else text

    return VARIABLE.sub(value, address)


def address_name(address: str) -> str:
    """An address for people: its scheme, and the host of a web server."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return address
    scheme, place = found["scheme"].lower(), found["place"].rpartition("@")[2]
    return f"{scheme}://{place.partition('/')[0]}" if scheme in _WEB else f"{scheme}://"
