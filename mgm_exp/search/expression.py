"""Small formulas over the values of a trial: ``_ratio * adapter.rank``, ``adapter.kind == 'lora'``, ``peak <= 20``.

They stand in sweep files (``when:``, ``value:``) and in ``sweep.constraints``. Arithmetic, comparisons, ``and``,
``or``, ``not``, ``in``, ``x if c else y`` and a few functions; names are keys of the configuration or of the search.
Nothing else is evaluated: a formula cannot reach an attribute, a function or a module of Python.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from mgm_exp.errors import ConfigError

Lookup = Callable[[str], Any]

LONGEST = 500
_LARGEST_POWER = 64
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "float": float,
    "floor": math.floor,
    "int": int,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
}
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
_LESS, _MORE = (ast.Lt, ast.LtE), (ast.Gt, ast.GtE)


class Expression:
    """A formula, checked when it is made.

    Args:
        text: The formula.
        where: The key that it stands under, for messages.

    Raises:
        ConfigError: it is not of the grammar above.

    Example:
        >>> Expression("_ratio * adapter.rank").value({"_ratio": 2, "adapter.rank": 8}.__getitem__)
        16
    """

    def __init__(self, text: str, where: str = "formula") -> None:
        self.text, self.where = text.strip(), where
        if len(self.text) > LONGEST:
            raise ConfigError(f"{where}: a formula has at most {LONGEST} characters; this one has {len(self.text)}.")
        try:
            self._tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{where}: {self.text!r} is not a formula ({error.args[0]}).") from error
        self.names = frozenset(self._names(self._tree))

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def _names(self, node: ast.AST) -> Iterator[str]:
        """Every name in it; refuses what is not of the grammar."""
        name = _dotted(node)
        if name is not None:
            if name not in _WORDS:
                yield name
            return
        if isinstance(node, ast.Call):
            function = _dotted(node.func)
            if function not in _FUNCTIONS or node.keywords:
                allowed = ", ".join(sorted(_FUNCTIONS))
                raise ConfigError(
                    f"{self.where}: {self.text!r} calls {function or 'something'}; the functions are {allowed}."
                )
            children: list[ast.AST] = list(node.args)
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, (int, float, str)):
                raise ConfigError(f"{self.where}: {self.text!r} holds {node.value!r}; numbers and texts are allowed.")
            children = []
        elif isinstance(node, (ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.List, ast.Tuple)):
            children = list(ast.iter_child_nodes(node))
        elif type(node) in _OPERATORS or isinstance(node, (ast.And, ast.Or, ast.Load, ast.Pow)):
            children = []
        else:
            raise ConfigError(
                f"{self.where}: {self.text!r} is more than a formula of numbers, texts, keys, + - * / // % **, "
                "comparisons, and, or, not, in, if-else."
            )
        for child in children:
            yield from self._names(child)

    def value(self, lookup: Lookup) -> Any:
        """The formula's value.

        Args:
            lookup: Name -> value.

        Raises:
            ConfigError: it cannot be computed (a division by zero, a text minus a number, ...).
        """
        try:
            return _evaluate(self._tree, lookup)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.where}: {self.text!r} cannot be computed: {error}.") from error

    def violation(self, lookup: Lookup) -> float | None:
        """By how much a condition is missed: 0 or less where it holds.

        ``a <= b`` is missed by ``a - b``; anything else by 1. None where a value that it needs is not known (None).
        """
        if not isinstance(self._tree, ast.Compare) or len(self._tree.ops) != 1:
            return 0.0 if self.value(lookup) else 1.0
        left, right = (self._part(part, lookup) for part in (self._tree.left, self._tree.comparators[0]))
        if left is None or right is None:
            return None
        kind = self._tree.ops[0]
        if isinstance(kind, (*_LESS, *_MORE)) and all(isinstance(side, (int, float)) for side in (left, right)):
            missed = float(left - right) if isinstance(kind, _LESS) else float(right - left)
            return missed if missed != 0 or isinstance(kind, (ast.LtE, ast.GtE)) else 1e-9
        return 0.0 if self.value(lookup) else 1.0

    def _part(self, node: ast.AST, lookup: Lookup) -> Any:
        try:
            return _evaluate(node, lookup)
        except TypeError as error:
            if any(lookup(name) is None for name in self.names):
                return None
            raise ConfigError(f"{self.where}: {self.text!r} cannot be computed: {error}.") from error
        except (ArithmeticError, ValueError) as error:
            raise ConfigError(f"{self.where}: {self.text!r} cannot be computed: {error}.") from error


def _dotted(node: ast.AST) -> str | None:
    """``adapter.rank`` for a chain of names; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])


def _evaluate(node: ast.AST, lookup: Lookup) -> Any:
    name = _dotted(node)
    if name is not None:
        return _WORDS[name] if name in _WORDS else lookup(name)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item, lookup) for item in node.elts]
    if isinstance(node, ast.BoolOp):
        stops_at = isinstance(node.op, ast.Or)
        result: Any = None
        for part in node.values:
            result = _evaluate(part, lookup)
            if bool(result) is stops_at:
                break
        return result
    if isinstance(node, ast.IfExp):
        return _evaluate(node.body if _evaluate(node.test, lookup) else node.orelse, lookup)
    if isinstance(node, ast.Call):
        return _FUNCTIONS[str(_dotted(node.func))](*(_evaluate(argument, lookup) for argument in node.args))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_evaluate(node.operand, lookup))
    if isinstance(node, ast.BinOp):
        return _binary(node.op, _evaluate(node.left, lookup), _evaluate(node.right, lookup))
    assert isinstance(node, ast.Compare)
    left = _evaluate(node.left, lookup)
    for kind, part in zip(node.ops, node.comparators, strict=True):
        right = _evaluate(part, lookup)
        if not _OPERATORS[type(kind)](left, right):
            return False
        left = right
    return True


def _binary(kind: ast.operator, left: Any, right: Any) -> Any:
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if not numbers:
        raise TypeError(f"{left!r} and {right!r} are not both numbers")
    if isinstance(kind, ast.Pow):
        if abs(right) > _LARGEST_POWER:
            raise ValueError(f"{right} is too large a power; at most {_LARGEST_POWER}")
        return left**right
    return _OPERATORS[type(kind)](left, right)
