"""What an hour of a card costs, by the user's own table: none is shipped, since prices change and differ by seller.

currency: EUR
rtx4090: 0.35
h100: {price: 2.49, currency: USD}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.config import Card, PlanConfig
from mgm_exp.errors import ConfigError
from mgm_exp.store import read_record, read_yaml

_CURRENCY = "currency"
_THIS = "auto"
_LONGEST = 16  # characters of a currency


@dataclass(frozen=True)
class Price:
    """Of an hour of one device.

    Args:
        amount: Money.
        currency: As the table names it; empty: it names none.
    """

    amount: float
    currency: str = ""


def price_of(section: PlanConfig) -> Price | None:
    """The price of the planned card: ``plan.price``, else the table's; None where neither says it.

    Raises:
        ConfigError: the table cannot be read, or has something that is no price.
    """
    table = prices_of(section)
    if section.price is not None:
        found = table.get(section.device)
        return Price(section.price, found.currency if found else _common(table))
    return table.get(section.device)


def prices_of(section: PlanConfig) -> dict[Card, Price]:
    """The whole table; ``auto`` is the price of this machine.

    Raises:
        ConfigError: as :func:`price_of`.
    """
    given = section.prices
    if given is None:
        return {}
    where = "plan.prices"
    if isinstance(given, str):
        where = f"plan.prices={given}"
        given = _read(Path(given).expanduser(), where)
    if not isinstance(given, dict):
        raise ConfigError(f"{where} holds no prices by card: it should be like h100: 2.5, with currency: EUR.")
    usual = given.get(_CURRENCY, "")
    if not _is_name(usual):
        raise ConfigError(f"{where}: currency={usual!r} must be a name such as EUR.")
    found = {}
    for name, value in given.items():
        if name == _CURRENCY:
            continue
        try:
            card = Card(name)
        except ValueError:
            allowed = ", ".join(card.value for card in Card)
            raise ConfigError(
                f"{where} names {name!r}, which is no card; allowed are {allowed}, and currency.",
                advice=f"{_THIS} is the price of this machine's own device.",
            ) from None
        found[card] = _price(value, usual, f"{where}: {name}")
    return found


def _price(value: Any, usual: str, where: str) -> Price:
    currency = usual
    if isinstance(value, dict):
        unknown = sorted(set(value) - {"price", _CURRENCY})
        if unknown or "price" not in value:
            raise ConfigError(f"{where} has {sorted(value)}; allowed are price, and currency where it is another one.")
        currency, value = value.get(_CURRENCY, usual), value["price"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf or not _is_name(currency):
        raise ConfigError(f"{where} is {value!r} {currency!r}; a price is a number above 0, a currency a name.")
    return Price(float(value), currency)


def _is_name(currency: Any) -> bool:
    """It is shown as it stands there."""
    return isinstance(currency, str) and currency.isprintable() and len(currency) <= _LONGEST


def _read(path: Path, where: str) -> Any:
    try:
        return read_record(path) if path.suffix == ".json" else read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where} cannot be read: {error}", advice="Give a YAML or JSON file with prices by card, or plan.price."
        ) from error


def _common(table: dict[Card, Price]) -> str:
    """The currency that all of a table have."""
    names = {price.currency for price in table.values()}
    return names.pop() if len(names) == 1 else ""
