"""reasoning-gym's graders, with nothing in them that evaluates an answer.

Nine of its graders hand the model's answer to `eval` or to `sympy.parse_expr`, which is `eval` behind a translation:
`__import__('os').system(...)` in an answer would run. Here the same graders run with other functions under these names:
`ast.literal_eval`, which reads lists and numbers, and `expression`, which reads arithmetic and the usual functions.
"""

from __future__ import annotations

import ast
import functools
import logging
import math
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

from ..utils.errors import BadValue
from ..utils.time_limit import TooSlow, limited
from .gym_options import dataset, parse

log = logging.getLogger(__name__)

LONGEST_ANSWER = 100_000  # characters
LONGEST_EXPRESSION = 2000  # characters
HIGHEST_POWER = 200  # also in a numeric power's exponent
# Seconds for one answer; sympy's simplification has inputs on which it does not end.
SECONDS = 10

_FUNCTIONS = frozenset(
    "Abs Rational acos acosh acot asin asinh atan atanh cos cosh cot coth csc csch erf exp ln log sec sech sign sin "
    "sinh sqrt tan tanh".split()
)
_CONSTANTS = {"pi": "pi", "E": "E", "I": "I"}
_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def score(problem: str, entry: str, answer: str) -> float:
    """reasoning-gym's score of an answer to a problem of `gym_problems.make`. An answer on which its grader raises, or
    works for more than 10 s, scores 0."""
    if len(answer) > LONGEST_ANSWER:
        return 0.0
    grade, known = _grader(problem), ast.literal_eval(entry)
    try:
        return float(limited(SECONDS, lambda: grade(answer, known)))
    except TooSlow:
        log.warning("gym:%s: an answer took its grader more than %d s, and scores 0", problem, SECONDS)
    except Exception as error:
        log.debug("gym:%s: its grader raised %s: %s", problem, type(error).__name__, error)
    return 0.0


@functools.lru_cache(64)
def _grader(problem: str) -> Callable[[str, dict], float]:
    (part,) = parse(problem)
    made = dataset(part, 0, 1)
    return types.MethodType(without_eval(type(made).score_answer), made)


def without_eval(function: Callable) -> Callable:
    """A copy of the function in which these names stand for what reads and does not evaluate. The package itself stays
    as it is."""
    names = {**function.__globals__, "eval": ast.literal_eval}
    if "parse_expr" in names:
        names["parse_expr"] = expression
    for name in ("sympy", "sp"):
        if isinstance(names.get(name), types.ModuleType):
            names[name] = _Sympy()
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


class _Sympy:
    """The package sympy, with another parse_expr."""

    def __getattr__(self, name: str) -> Any:
        import sympy

        return expression if name == "parse_expr" else getattr(sympy, name)


def expression(text: str, local_dict: Mapping[str, Any] | None = None) -> Any:
    """The sympy expression of a text: numbers, names, + - * / ** and functions, as sympy.parse_expr reads them.
    ValueError for everything else."""
    if len(text) > LONGEST_EXPRESSION:
        raise BadValue(f"expected an expression of at most {LONGEST_EXPRESSION} characters, got {len(text)}")
    try:
        return _built(ast.parse(text.strip(), mode="eval").body, local_dict or {})
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise BadValue(f"no expression: {text!r:.80} ({error})") from None


def _built(node: ast.AST, names: Mapping[str, Any]) -> Any:
    import sympy

    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return sympy.Integer(node.value) if type(node.value) is int else sympy.Float(node.value)
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        return getattr(sympy, _CONSTANTS[node.id]) if node.id in _CONSTANTS else sympy.Symbol(node.id)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_built(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _built(node.left, names), _built(node.right, names)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if not node.keywords:
            return getattr(sympy, node.func.id)(*(_built(a, names) for a in node.args))
    raise BadValue(f"{type(node).__name__} is no part of an expression")


def _check_power(base: Any, power: Any) -> None:
    """ValueError for a power that takes long to calculate or to expand: no exponents beyond HIGHEST_POWER, and no base
    that is a large power already."""
    if power.is_number and not abs(complex(power)) <= HIGHEST_POWER:
        raise BadValue(f"expected an exponent of at most {HIGHEST_POWER}")
    if base.is_Integer and power.is_number and math.log2(abs(int(base)) + 2) * abs(complex(power)) > 10_000:
        raise BadValue("expected a power of at most 10000 bits")
