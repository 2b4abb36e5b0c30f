"""`data.where`: a filter on the rows of a table, such as `aesthetic > 5 and motion > 0.3`.

The text is parsed with `ast` and translated to an expression of pyarrow; nothing of it is executed.
"""

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.layouts.cells import is_missing
from cogds.data.layouts.columns import find_column, listed
from cogds.errors import UserError, did_you_mean

# A text, a name in backquotes, or an operator as SQL writes it.
_TOKEN = re.compile(r"'[^']*'|\"[^\"]*\"|`(?P<quoted>[^`]*)`|\b(?P<operator>AND|OR|NOT|IN|IS)\b")
_EQUALS = re.compile(r"(?<![<>=!])=(?!=)")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
}
_CONSTANTS = {"null": None, "none": None, "true": True, "false": False}
_ADVICE = (
    "Compare columns with values and combine comparisons with and, or, not: aesthetic > 5 and `motion score` > 0.3; "
    "split in ['train', 'extra']; speaker is not null"
)
_Type = type[float] | type[str] | type[bool]


class Where:
    """A filter. Rows whose value is missing do not satisfy a comparison, nor its opposite.

    Attributes:
        names: the columns that it names, which may differ from the table's in case, blanks and hyphens.
    """

    def __init__(self, text: str) -> None:
        """Parse a filter. Raises UserError if it is not one."""
        self._text = text
        self._quoted: dict[str, str] = {}
        self._types: dict[str, _Type | None] = {}
        try:
            tree = ast.parse(_TOKEN.sub(self._python_token, text).strip(), mode="eval")
            self._expression = self._translate(tree.body)
        except SyntaxError as error:
            equals = " Write == instead of =." if _EQUALS.search(_TOKEN.sub("", text)) else ""
            raise self._error(f"it cannot be parsed ({error.msg}).{equals}") from None
        except RecursionError:
            raise self._error("it is nested too deeply.") from None
        self.names = tuple(self._types)

    def _python_token(self, match: re.Match[str]) -> str:
        """A token in Python's notation, with a name that has no blanks for a name in backquotes."""
        if match["operator"]:
            return match["operator"].lower()
        if match["quoted"] is None:
            return match[0]
        name = f"quoted_column_{len(self._quoted)}"
        self._quoted[name] = match["quoted"]
        return name

    def _error(self, problem: str) -> UserError:
        return UserError(f"data.where: {self._text!r}: {problem} {_ADVICE}.")

    # --- the expression: columns are fields with the numbers of their names

    def _translate(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp():
                combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
                return functools.reduce(combine, map(self._translate, node.values))
            case ast.UnaryOp(op=ast.Not()):
                return ~self._translate(node.operand)
            case ast.Compare():
                sides = [node.left, *node.comparators]
                parts = [self._compare(sides[at], kind, sides[at + 1]) for at, kind in enumerate(node.ops)]
                return functools.reduce(operator.and_, parts)
            case ast.Name() if node.id.lower() not in _CONSTANTS:
                return self._column(node, bool)
        raise self._error(f"{self._source(node)} is not a comparison.")

    def _compare(self, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> pc.Expression:
        if not self._is_column(left) and self._is_column(right) and type(kind) in _MIRRORED:
            left, kind, right = right, _MIRRORED[type(kind)](), left
        if not self._is_column(left) or self._is_column(right):
            raise self._error(f"{self._source(left)} and {self._source(right)} are not a column and a value.")
        value = self._value(right)
        if value is None and isinstance(kind, ast.Is | ast.IsNot | ast.Eq | ast.NotEq):
            is_null = self._column(left, None).is_null(nan_is_null=True)
            return is_null if isinstance(kind, ast.Is | ast.Eq) else ~is_null
        if isinstance(kind, ast.In | ast.NotIn) and isinstance(value, list) and value:
            column = self._column(left, self._type(value[0], right))
            if len({self._type(item, right) for item in value}) > 1:
                raise self._error(f"{self._source(right)} has values of several types.")
            is_in = column.isin([float(item) if self._type(item, right) is float else item for item in value])
            return is_in if isinstance(kind, ast.In) else ~is_in & column.is_valid()
        if type(kind) in _COMPARISONS and not isinstance(value, list):
            return _COMPARISONS[type(kind)](self._column(left, self._type(value, right)), value)
        raise self._error(f"{self._source(left)} cannot be compared with {self._source(right)} in this way.")

    def _is_column(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id.lower() not in _CONSTANTS

    def _column(self, node: ast.expr, kind: _Type | None) -> pc.Expression:
        assert isinstance(node, ast.Name)
        name = self._quoted.get(node.id, node.id)
        known = self._types.get(name)
        if known is not None and kind is not None and known is not kind:
            raise self._error(f"{name} is compared with values of several types.")
        self._types[name] = known or kind
        return pc.field(str(list(self._types).index(name)))

    def _value(self, node: ast.expr) -> Any:
        """A number, text, True, False, None, or a list of these."""
        match node:
            case ast.Constant(value=str() | int() | float() | bool() | None):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Name() if node.id.lower() in _CONSTANTS:
                return _CONSTANTS[node.id.lower()]
            case ast.List() | ast.Tuple() | ast.Set():
                return [self._value(item) for item in node.elts]
        raise self._error(f"{self._source(node)} is not a value.")

    def _type(self, value: Any, node: ast.expr) -> _Type:
        if isinstance(value, bool):
            return bool
        if isinstance(value, int | float):
            return float
        if isinstance(value, str):
            return str
        raise self._error(f"{self._source(node)} is not a value to compare with.")

    def _source(self, node: ast.expr) -> str:
        source = ast.unparse(node)
        for name, quoted in self._quoted.items():
            source = source.replace(name, f"`{quoted}`")
        return source

    # --- filtering

    def columns(self, available: Sequence[str], file: str) -> list[str]:
        """The table's columns with the filter's names. Raises UserError if there is none with one of them."""
        columns = []
        for name in self.names:
            column = find_column(name, available)
            if column is None:
                hint = did_you_mean(name, map(str, available))
                raise UserError(
                    f"data.where: no column '{name}'{hint} in {file}: {listed(available)}. Correct the name."
                )
            columns.append(column)
        return columns

    def matching(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], file: str) -> list[int]:
        """The numbers of the rows that satisfy the filter. Raises UserError if their values have other types.

        columns: the table's, from `columns`.
        """
        arrays = [
            _array([row.get(column) for row in rows], self._types[name], column, file)
            for name, column in zip(self.names, columns)
        ]
        table = pa.table([*arrays, pa.array(range(len(rows)))], [*map(str, range(len(arrays))), "row"])
        return table.filter(self._expression)["row"].to_pylist()


def _array(values: Iterable[Any], kind: _Type | None, column: str, file: str) -> pa.Array:
    """The values of a column as numbers, texts or truth values; without a type, only whether they are there."""
    convert, arrow_type, noun = _CONVERSIONS[kind]
    converted = []
    for value in values:
        is_empty = is_missing(value) or (kind is not str and isinstance(value, str) and not value.strip())
        try:
            converted.append(None if is_empty else convert(value))
        except (TypeError, ValueError):
            raise UserError(
                f"data.where: column '{column}' of {file} holds {value!r}, which is not {noun}. Compare it with "
                "another value, or correct the table."
            ) from None
    return pa.array(converted, arrow_type)


def _number(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    return value if isinstance(value, str) else str(value)


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": 1, "false": 0, "1": 1, "0": 0}.get(value.strip().lower())
    if value not in (0, 1):
        raise ValueError
    return bool(value)


_CONVERSIONS: dict[_Type | None, tuple[Callable[[Any], Any], pa.DataType, str]] = {
    float: (_number, pa.float64(), "a number"),
    str: (_text, pa.string(), "a text"),
    bool: (_truth, pa.bool_(), "true or false"),
    None: (lambda _: True, pa.bool_(), ""),
}
