"""Small mistakes, made one at a time in the methods of a module's classes."""

from __future__ import annotations

import ast
import copy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {
    ast.Gt: (ast.Lt, ast.GtE),
    ast.GtE: (ast.LtE, ast.Gt),
    ast.Lt: (ast.Gt, ast.LtE),
    ast.LtE: (ast.GtE, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
FUNCTIONS = {
    "amin": "amax",
    "amax": "amin",
    "exp": "log",
    "log": "exp",
    "expm1": "exp",
    "log1p": "log",
    "logsumexp": "sum",
    "mean": "sum",
    "sum": "mean",
    "ones_like": "zeros_like",
    "zeros_like": "ones_like",
    "softmax": "log_softmax",
    "isfinite": "isnan",
}
LEFT_OUT = ("detach", "to")


@dataclass(frozen=True)
class Mutant:
    """A module with one mistake.

    Attributes
    ----------
    owner : the class that has it
    change : the method and what is changed there, unique in the module
    tree : the whole module
    """

    owner: str
    change: str
    tree: ast.Module

    @contextmanager
    def imported(self, path: str) -> Iterator[ModuleType]:
        """Import it as a module of its own, which pickle finds, as if it were at ``path``."""
        module = ModuleType("mutant")
        module.__file__ = path
        sys.modules["mutant"] = module
        try:
            exec(compile(self.tree, path, "exec"), vars(module))
            yield module
        finally:
            del sys.modules["mutant"]


def mutants(source: str) -> list[Mutant]:
    """Return every mutant of a module's source."""
    tree = ast.parse(source)
    times: Counter[str] = Counter()
    made = []
    for cls, method in _methods(tree):
        for node in _code(method):
            for other in _mistakes(node):
                change = f"{cls.name}.{method.name}: {_shown(node)} -> {_shown(other)}"
                times[change] += 1
                again = f" #{times[change]}" if times[change] > 1 else ""
                made.append(Mutant(cls.name, change + again, _replaced(tree, node, other)))
    return made


def unchanged(source: str) -> list[Mutant]:
    """Return the module without a mistake, once for each of its classes that has methods."""
    tree = ast.parse(source)
    owners = dict.fromkeys(cls.name for cls, _ in _methods(tree))
    return [Mutant(owner, "", tree) for owner in owners]


def subclasses(module: ModuleType, owner: str) -> list[type]:
    """Return the class ``owner`` of a module, and those that inherit from it there."""
    base = getattr(module, owner)
    made = [each for each in vars(module).values() if isinstance(each, type)]
    return [cls for cls in made if issubclass(cls, base)]


def _methods(tree: ast.Module) -> Iterator[tuple[ast.ClassDef, ast.FunctionDef]]:
    for cls in tree.body:
        if isinstance(cls, ast.ClassDef):
            yield from ((cls, each) for each in cls.body if isinstance(each, ast.FunctionDef))


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run, without types, decorators and the messages of errors."""
    yield node
    if isinstance(node, ast.Raise):
        return
    for name, child in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, ast.AST):
                    yield from _code(each)


def _mistakes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what could stand in the place of ``node`` by mistake."""
    match node:
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.Compare(ops=[op]):
            yield from (_with(node, ops=[other()]) for other in COMPARISONS.get(type(op), ()))
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.IfExp(body=body, orelse=orelse):
            yield _with(node, body=orelse, orelse=body)
        case ast.If(test=test):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Constant(value=value):
            yield from (ast.Constant(other) for other in _other_constants(value))
        case ast.Call():
            yield from _other_calls(node)
        case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Raise() | ast.Expr(ast.Call()):
            yield ast.Pass()


def _other_constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [0, 2] if value == 1 else [value + 1]
    if isinstance(value, float):
        return [2 * value or 1.0]
    return []


def _other_calls(call: ast.Call) -> Iterator[ast.AST]:
    for i in range(len(call.args) - 1):
        first, second = call.args[i : i + 2]
        yield _with(call, args=[*call.args[:i], second, first, *call.args[i + 2 :]])
    for keyword in call.keywords:
        yield _with(call, keywords=[each for each in call.keywords if each is not keyword])
    if isinstance(call.func, ast.Attribute):
        if call.func.attr in FUNCTIONS:
            yield _with(call, func=_with(call.func, attr=FUNCTIONS[call.func.attr]))
        if call.func.attr in LEFT_OUT:
            yield call.func.value


def _with(node: ast.AST, **fields: object) -> ast.AST:
    twin = copy.copy(node)
    for name, value in fields.items():
        setattr(twin, name, value)
    return twin


def _replaced(tree: ast.Module, node: ast.AST, other: ast.AST) -> ast.Module:
    # A copy finds each node in the memo first.
    twin = copy.deepcopy(tree, {id(node): ast.copy_location(copy.copy(other), node)})
    return ast.fix_missing_locations(twin)


def _shown(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]
