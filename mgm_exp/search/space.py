"""What a search may choose: from Hydra's grammar and sweep files to numbers, choices, conditions and derived values.

    adapter.rank=choice(4,8,16,32)              one of them
    train.lr=tag(log,interval(1e-4,1e-2))       a number between, both ends included
    train.max_steps=int(interval(40,120))       a whole number between, both ends included
    train.max_steps=range(40,121,20)            40, 60, ... 120: the end is excluded, as everywhere in Hydra

A sweep file (``hydra.sweeper.params``) can also say when a key is chosen and how one follows from another:

    adapter.rank: {space: "choice(4,8,16)", when: "adapter.kind == 'lora'"}
    _ratio: choice(1,2,4)                       a leading _: chosen, but no key of the configuration
    adapter.alpha: {value: "_ratio * adapter.rank", when: "adapter.kind == 'lora'"}

Several entries for one key, in a list, are tried in order; the first whose ``when`` holds is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import ConfigError
from mgm_exp.search.expression import Expression

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from optuna.distributions import BaseDistribution

Parse = Callable[[list[str]], Sequence["Override"]]
# (name, overrides so far) -> the value of a key in the configuration that they compose to.
ConfigValue = Callable[[str, Sequence[str]], Any]

_ENTRY = {"space", "when", "value"}


@dataclass(frozen=True)
class Choice:
    """One of some values; ``texts`` are the same as they are written in an override."""

    values: tuple[Any, ...]
    texts: tuple[str, ...]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def points(self) -> list[Any]:
        return list(self.values)

    def taken(self, value: Any) -> list[Any]:
        """``value`` as one of the choices, in a list; an empty one where it is none (None may be a choice)."""
        for choice, text in zip(self.values, self.texts, strict=True):
            if (choice == value and isinstance(choice, bool) == isinstance(value, bool)) or value == text:
                return [choice]
            if isinstance(choice, str) and not isinstance(value, bool) and str(value) == choice:
                return [choice]
        return []

    def text(self, value: Any) -> str:
        return self.texts[self.values.index(value)]

    def __str__(self) -> str:
        return ", ".join(self.texts)


@dataclass(frozen=True)
class Numbers:
    """Numbers from ``low`` to ``high``, both included; whole ones where ``is_whole``."""

    low: float
    high: float
    step: float | None = None
    log: bool = False
    is_whole: bool = False

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Any, name: str) -> Any:
        if self.is_whole:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def points(self) -> list[Any] | None:
        """Every value; None where there are infinitely many."""
        step = self.step or (1 if self.is_whole else None)
        if step is None:
            return None
        count = round((self.high - self.low) / step) + 1
        values = [float(Decimal(str(self.low)) + i * Decimal(str(step))) for i in range(count)]
        return [int(value) for value in values] if self.is_whole else values

    def taken(self, value: Any) -> list[Any]:
        """``value`` as a number of this range, in a list; an empty one where it is none."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return []
        points = self.points() if self.step or self.is_whole else None
        if points is not None:
            return [point for point in points if math.isclose(point, value, rel_tol=1e-9, abs_tol=1e-12)][:1]
        return [float(value)]

    def text(self, value: Any) -> str:
        return repr(value)

    def __str__(self) -> str:
        kind = "whole numbers" if self.is_whole else "numbers"
        return f"{kind} from {self.low:g} to {self.high:g}" + (f" in steps of {self.step:g}" if self.step else "")


@dataclass(frozen=True)
class Dimension:
    """One thing that is chosen.

    Args:
        key: The key that is set; one that begins with ``_`` is only used in formulas.
        name: Its name in the study: the key, with ``@2`` and so on where one key has several entries.
        domain: From what it is chosen.
        when: Under which condition.
    """

    key: str
    name: str
    domain: Choice | Numbers
    when: Expression | None = None


@dataclass(frozen=True)
class Derived:
    """One key that follows from others."""

    key: str
    formula: Expression
    when: Expression | None = None


@dataclass(frozen=True)
class Point:
    """What was chosen for one trial.

    Args:
        overrides: All that the trial's command line gives it, fixed ones first.
        params: What was chosen or derived: key -> value, ``_`` names included.
    """

    overrides: tuple[str, ...]
    params: dict[str, Any]


@dataclass(frozen=True)
class Space:
    """Fixed overrides, and what is chosen for each trial, in an order in which every formula finds its names."""

    fixed: tuple[str, ...]
    items: tuple[Dimension | Derived, ...]
    _keys: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_keys", frozenset(item.key for item in self.items))

    @property
    def keys(self) -> list[str]:
        """The keys of the configuration that are swept, each once."""
        return list(dict.fromkeys(item.key for item in self.items if not item.key.startswith("_")))

    @property
    def dimensions(self) -> list[Dimension]:
        return [item for item in self.items if isinstance(item, Dimension)]

    @property
    def is_conditional(self) -> bool:
        """Whether trials differ in what is chosen for them."""
        return any(item.when is not None for item in self.dimensions)

    def grid(self) -> dict[str, list[Any]]:
        """Every value of every dimension.

        Raises:
            ConfigError: one of them has infinitely many, or is there for some trials only.
        """
        values: dict[str, list[Any]] = {}
        for item in self.dimensions:
            points = item.domain.points()
            if points is None:
                raise ConfigError(
                    f"sweep.sampler.name=grid: {item.key} is chosen from {item.domain}, which have no end; use "
                    "choice(...) or range(...)."
                )
            if item.when is not None:
                raise ConfigError(f"sweep.sampler.name=grid: {item.key} depends on {item.when.text!r}; use tpe.")
            values[item.name] = points
        return values

    def choose(self, trial: Any, config_value: ConfigValue) -> Point:
        """Draws a point.

        Args:
            trial: An Optuna trial; what it has already is kept.
            config_value: Reads a key of the configuration that the overrides so far compose to.
        """
        params: dict[str, Any] = {}
        overrides = list(self.fixed)

        def lookup(name: str) -> Any:
            return params[name] if name in params else config_value(name, overrides)

        for item in self.items:
            if item.key in params or (item.when is not None and not item.when.value(lookup)):
                continue
            if isinstance(item, Dimension):
                value = item.domain.suggest(trial, item.name)
                text = item.domain.text(value)
            else:
                value = item.formula.value(lookup)
                text = as_text(value)
            params[item.key] = value
            if not item.key.startswith("_"):
                overrides.append(f"{item.key}={text}")
        return Point(tuple(overrides), params)

    def fixed_point(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A point that is to be tried, as names and values of the study.

        Args:
            given: Key -> value; not every key need be there.
            where: For messages, such as ``sweep.enqueue[0]``.

        Raises:
            ConfigError: a key is not chosen in this search, or a value is not one that it may take.
        """
        names: dict[str, Any] = {}
        for key, value in given.items():
            entries = [item for item in self.dimensions if key in (item.key, item.name)]
            if not entries:
                allowed = ", ".join(dict.fromkeys(item.key for item in self.dimensions))
                why = "follows from others" if key in self._keys else "is not chosen"
                raise ConfigError(f"{where}: {key} {why} in this search; what is chosen: {allowed}.")
            taken = {item.name: found[0] for item in entries if (found := item.domain.taken(value))}
            if not taken:
                domains = " or ".join(str(item.domain) for item in entries)
                raise ConfigError(f"{where}: {key}={value!r} is not what {key} is chosen from: {domains}.")
            names |= taken
        return names


def as_text(value: Any) -> str:
    """A value as it is written in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        from hydra.core.override_parser.types import Quote, QuotedString

        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(as_text(item) for item in value) + "]"
    return repr(value)


def parse_space(arguments: Sequence[str], params: Mapping[str, Any], parse: Parse) -> Space:
    """The search space of a command line and a sweep file.

    Args:
        arguments: Overrides as they were typed; of the same key the last one counts.
        params: ``hydra.sweeper.params``; the command line wins over it.
        parse: Overrides as Hydra understands them.

    Raises:
        ConfigError: something cannot be chosen from, or formulas go round in circles.
    """
    fixed: dict[str, str] = {}
    chosen: dict[str, list[Dimension | Derived]] = {}
    for key, entry in params.items():
        _take(str(key), entry, fixed, chosen, parse)
    for override in parse(list(arguments)):
        key = override.get_key_element()
        fixed.pop(key, None)
        chosen.pop(key, None)
        if override.is_sweep_override():
            chosen[key] = [Dimension(key, key.lstrip("+"), _domain(override, parse))]
        else:
            fixed[key] = str(override.input_line)
    return Space(tuple(fixed.values()), tuple(_ordered([item for items in chosen.values() for item in items])))


def _take(
    key: str, entry: Any, fixed: dict[str, str], chosen: dict[str, list[Dimension | Derived]], parse: Parse
) -> None:
    where = f"hydra.sweeper.params.{key}"
    entries = entry if isinstance(entry, list) else [entry]
    for number, item in enumerate(entries, 1):
        if not isinstance(item, Mapping):
            item = {"space": item}
        unknown = sorted(set(item) - _ENTRY)
        if unknown or ("space" in item) == ("value" in item):
            raise ConfigError(
                f"{where} has {sorted(item)}; it takes space (what is chosen from) or value (a formula), and when."
            )
        when = Expression(str(item["when"]), f"{where}.when") if item.get("when") is not None else None
        if "value" in item:
            chosen.setdefault(key, []).append(Derived(key, Expression(str(item["value"]), where), when))
            continue
        (override,) = parse([f"{'+' if key.startswith('_') else ''}{key}={item['space']}"])
        name = key.lstrip("+") if number == 1 else f"{key.lstrip('+')}@{number}"
        if override.is_sweep_override():
            chosen.setdefault(key, []).append(Dimension(key, name, _domain(override, parse), when))
        elif when is None and len(entries) == 1 and not key.startswith("_"):
            fixed[key] = str(override.input_line)
        else:
            text = str(override.input_line).partition("=")[2]
            chosen.setdefault(key, []).append(
                Dimension(key, name, Choice((_label(override.value(), text),), (text,)), when)
            )


def _domain(override: Override, parse: Parse) -> Choice | Numbers:
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    sweep, line = override.value(), override.input_line
    log = "log" in getattr(sweep, "tags", set())
    unknown = sorted(set(getattr(sweep, "tags", set())) - {"log"})
    if unknown:
        raise ConfigError(f"{line}: the tag {unknown[0]} is not known; there is log.")
    if isinstance(sweep, (ChoiceSweep, Glob)):
        return _choice(override, parse)
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        assert low is not None and high is not None
        is_whole = isinstance(low, int) and isinstance(high, int)
        domain = Numbers(low, high, None, log, is_whole)
    else:
        assert isinstance(sweep, RangeSweep)
        domain = _range(sweep, log, str(line))
    if not (math.isfinite(domain.low) and math.isfinite(domain.high)) or domain.low > domain.high:
        raise ConfigError(f"{line}: its ends must be finite numbers, the lower one first.")
    if log and domain.low <= 0:
        raise ConfigError(f"{line}: a logarithmic scale begins above 0.")
    return domain


def _range(sweep: Any, log: bool, line: str) -> Numbers:
    """Hydra's range, whose end is excluded, as numbers whose last one is included."""
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    if step == 0 or (stop - start) / step <= 0:
        raise ConfigError(f"{line} has no value: its end is excluded.")
    is_whole = all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step))
    last = start + step * (math.ceil((stop - start) / step) - 1)
    low, high, size = min(start, last), max(start, last), abs(step)
    if log:
        if not is_whole or size != 1:
            raise ConfigError(f"{line}: a logarithmic scale has no steps; use tag(log,interval(...)) or choice(...).")
        return Numbers(int(low), int(high), None, True, True)
    if is_whole:
        return Numbers(int(low), int(high), int(size), False, True)
    return Numbers(float(low), float(high), float(size), False, False)


def _choice(override: Override, parse: Parse) -> Choice:
    texts = list(dict.fromkeys(str(text) for text in override.sweep_string_iterator()))
    if not texts:
        raise ConfigError(f"{override.input_line} has no value.", advice="Check the pattern; `--help` lists all.")
    key = override.get_key_element()
    values = []
    for line, text in zip(parse([f"{key}={text}" for text in texts]), texts, strict=True):
        values.append(_label(line.value(), text))
    if len({(type(value).__name__, value) for value in values}) < len(values):
        raise ConfigError(f"{override.input_line} has a value twice.")
    plain = [as_text(value) if isinstance(value, bool) else text for value, text in zip(values, texts, strict=True)]
    return Choice(tuple(values), tuple(plain))


def _label(value: Any, text: str) -> Any:
    """How a choice stands in the study: itself, or as it is written where it is a list or no ordinary number."""
    if isinstance(value, float) and not math.isfinite(value):
        return text
    return value if value is None or isinstance(value, (bool, int, float, str)) else text


def _ordered(items: Sequence[Dimension | Derived]) -> list[Dimension | Derived]:
    """Groups and plain choices first, then what depends on others after these."""
    keys = {item.key.lstrip("+") for item in items}

    def needs(item: Dimension | Derived) -> set[str]:
        formulas = [item.when, item.formula if isinstance(item, Derived) else None]
        names = {name for formula in formulas if formula is not None for name in formula.names}
        # A name of the configuration that is not chosen itself may still follow from a group that is.
        groups = {key for key in keys if any(name.startswith(f"{key}.") for name in names)}
        return ((names & keys) | groups) - {item.key.lstrip("+")}

    left, done, ordered = list(items), set[str](), []
    while left:
        waiting = {item.key.lstrip("+") for item in left}
        free = [item for item in left if not needs(item) & waiting]
        if not free:
            circle = ", ".join(sorted(waiting))
            raise ConfigError(f"These keys of the search depend on each other in a circle: {circle}.")
        first = free[0]
        # All entries of one key stand together, in their order.
        same = [item for item in left if item.key == first.key]
        if any(item not in free for item in same):
            first = next((item for item in free if all(o in free for o in left if o.key == item.key)), first)
            same = [item for item in left if item.key == first.key]
        ordered += same
        left = [item for item in left if item.key != first.key]
        done.add(first.key)
    return ordered
