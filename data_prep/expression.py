"""Conditions over a picture's metadata, as in `aesthetic >= 5 and watermark < 0.5`.

A small part of Python's grammar, walked over and never evaluated: and, or, not, comparisons, in, arithmetic
on numbers, names of metadata fields, row["odd name"], and constants.
"""

import ast
import operator
from typing import Any

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


class Unknown(Exception):
    """The condition cannot be decided; says why."""


def parse_condition(text: str) -> ast.expr:
    """Raises ValueError where it is more than the grammar above."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an expression: {text!r}") from error
    _check(tree)
    return tree


def _check(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()) | ast.Name():
            return
        case ast.Subscript(value=ast.Name(id="row"), slice=ast.Constant(value=str())):
            return
        case ast.BoolOp(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts):
            pass
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=part):
            parts = [part]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            parts = [left, right]
        case ast.Compare(left=left, comparators=others):
            parts = [left, *others]
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not allowed in a condition")
    for part in parts:
        _check(part)


def names_in(tree: ast.expr) -> list[str]:
    """The metadata fields that a condition reads."""
    found = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id != "row"]
    return found + [n.slice.value for n in ast.walk(tree) if isinstance(n, ast.Subscript)]  # pyright: ignore


def value_of(node: ast.expr, facts: dict[str, Any]) -> Any:
    """What an expression comes to; a missing field is None. Raises Unknown where None is compared or reckoned."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
            return facts.get(name)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [value_of(part, facts) for part in parts]
        case ast.BoolOp(op=op, values=parts):
            values = (bool(value_of(part, facts)) for part in parts)
            return all(values) if isinstance(op, ast.And) else any(values)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not value_of(part, facts)
        case ast.UnaryOp(operand=part):
            return 0 - _number(value_of(part, facts), part)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = (_number(value_of(part, facts), part) for part in (left, right))
            try:
                return ARITHMETIC[type(op)](a, b)
            except ArithmeticError as error:
                raise Unknown(f"{ast.unparse(node)}: {error}") from error
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compare(node, left, ops, others, facts)
    raise AssertionError(f"parse_condition let {ast.unparse(node)} pass")


def _number(value: Any, node: ast.expr) -> float:
    if not isinstance(value, int | float):
        raise Unknown(f"{ast.unparse(node)} is {'missing' if value is None else 'no number'}")
    return value


def _compare(
    node: ast.expr,
    left: ast.expr,
    ops: list[ast.cmpop],
    others: list[ast.expr],
    facts: dict[str, Any],
) -> bool:
    before = value_of(left, facts)
    for op, other in zip(ops, others, strict=True):
        after = value_of(other, facts)
        ordered = isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
        if ordered and (before is None or after is None):
            raise Unknown(f"{ast.unparse(left if before is None else other)} is missing")
        try:
            if not COMPARISONS[type(op)](before, after):
                return False
        except TypeError as error:
            raise Unknown(f"{ast.unparse(node)}: {error}") from error
        before, left = after, other
    return True
