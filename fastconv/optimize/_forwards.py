"""Forwards rewritten: calls that follow each other, and sums with what they return, become one call each.

``y = self.bn(self.conv(x))``, then ``y += x``, then ``return relu(y)`` becomes::

    y = DEFER((self.conv, self.bn), x)
    return ADD(y, x, True, (relu,))

which :mod:`fastconv.nn._chains` runs: in one call what is a chain, one by one what is none. Nothing else of
the function changes, and it is rewritten only if its source is, to the byte code, what runs.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from ..nn._chains import ADD, DEFER, RUN
from ._source import function_with, node_of

HELPERS = {
    "_fastconv_run": RUN,
    "_fastconv_defer": DEFER,
    "_fastconv_add": ADD,
    "_fastconv_partial": functools.partial,
}
RUN_NAME, DEFER_NAME, ADD_NAME, PARTIAL_NAME = HELPERS
SUM = object()  # in a place's steps: where something is added


@dataclass(frozen=True)
class Rewritten:
    """A forward, rewritten.

    Attributes:
        function: of which it is the forward.
        forward: does the same.
        deferred: the same, but what it returns may be a ``Pending``, to which its caller adds.
        places: for each run of calls, the conditions under which it is reached, as code and what that must
            give; and the code of each call, ``SUM`` where there is a sum.
        plain: it only calls its layers one after the other, and writes to none of its inputs.
    """

    function: FunctionType
    forward: FunctionType
    deferred: FunctionType
    places: list[tuple[list[tuple[CodeType, bool]], list[Any]]]
    plain: bool

    def layers(self, module: Any) -> Iterator[list[Any]]:
        """What each run of calls would call for a module, as far as that can be told before it runs."""
        names = {self.function.__code__.co_varnames[0]: module}
        for conditions, steps in self.places:
            found = [_evaluate(code, self.function, names, wanted, bool) for code, wanted in conditions]
            if all(value is wanted for value, (_, wanted) in zip(found, conditions)):
                yield [
                    SUM if step is SUM else _evaluate(step, self.function, names, object()) for step in steps
                ]


def _evaluate(code, function: FunctionType, names: dict[str, Any], default: Any, convert=lambda x: x) -> Any:
    try:
        return convert(eval(code, function.__globals__, names))
    except Exception:  # it depends on what only a call knows
        return default


@functools.cache
def rewritten(function: Any, kind: type) -> Rewritten | None:
    """A class's forward rewritten, or None: nothing to rewrite, or its source does not tell what it does."""
    node = node_of(function)
    if node is None:
        return None
    writer = _Writer(function.__code__, kind)
    body = writer.block(node.body)
    if not writer.places:
        return None
    forward = function_with(function, node, body, HELPERS)
    deferred = function_with(
        function, node, [_deferred(statement) for statement in copy.deepcopy(body)], HELPERS
    )
    places = [
        ([(_code(test), wanted) for test, wanted in conditions], [s if s is SUM else _code(s) for s in steps])
        for conditions, steps in writer.places
    ]
    return Rewritten(function, forward, deferred, places, _is_plain(node, writer))


def _code(step: ast.expr) -> CodeType:
    tree = ast.fix_missing_locations(ast.Expression(_expand(copy.deepcopy(step))))
    return compile(tree, "<step>", "eval", dont_inherit=True)


def _expand(step: ast.expr) -> ast.expr:
    """A step without the helper's name for ``functools.partial``."""

    class Expand(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.expr:
            named = isinstance(node.func, ast.Name) and node.func.id == PARTIAL_NAME
            return node.args[0] if named else node

    return Expand().visit(step)


class _Deferred(ast.NodeTransformer):
    def visit_With(self, node: ast.With) -> ast.With:
        return node  # what is returned within must be computed within

    def visit_Return(self, node: ast.Return) -> ast.Return:
        value = node.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == RUN_NAME:
            value.func.id = DEFER_NAME
        return node


def _deferred(statement: ast.stmt) -> ast.stmt:
    return _Deferred().visit(statement)


def _is_plain(node: ast.FunctionDef, writer: _Writer) -> bool:
    def allows(child: ast.AST) -> bool:
        if isinstance(child, ast.Assign):
            return _target(child) is not None
        if isinstance(child, ast.Expr):
            return isinstance(child.value, ast.Constant)  # a docstring
        if isinstance(child, ast.Call):
            return bool(writer.run_of(child).steps) and _root(child.func) == writer.own
        return not isinstance(child, ast.stmt) or isinstance(child, (ast.If, ast.Return))

    return all(allows(child) for statement in node.body for child in ast.walk(statement))


@dataclass
class _Sum:
    """``left + right``, of which one may be a run that is deferred."""

    left: ast.expr | _Run
    right: ast.expr | _Run
    inplace: bool
    steps: list[ast.expr] = field(default_factory=list)  # of the run that is deferred


@dataclass
class _Run:
    """Calls one after the other, on what an expression or a sum gives."""

    base: ast.expr | _Sum
    steps: list[ast.expr] = field(default_factory=list)


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(_load(name), list(arguments), [])


def _tuple(parts: Sequence[ast.expr]) -> ast.Tuple:
    return ast.Tuple(list(parts), ast.Load())


def _root(path: ast.expr) -> str | None:
    """The name at the root of ``name.a.b[0]``; None if it is something else."""
    while isinstance(path, ast.Attribute) or (
        isinstance(path, ast.Subscript) and isinstance(path.slice, ast.Constant)
    ):
        path = path.value
    return path.id if isinstance(path, ast.Name) else None


def _target(statement: ast.stmt) -> str | None:
    """The name that an assignment sets."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _mentions(name: str, *nodes: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for node in nodes for n in ast.walk(node))


class _Writer:
    """Rewrites blocks of one function's statements."""

    def __init__(self, code: CodeType, kind: type) -> None:
        self.kind = kind
        self.own = code.co_varnames[0]
        self.locals = set(code.co_varnames)
        self.places: list[tuple[list[tuple[ast.expr, bool]], list[Any]]] = []
        self.conditions: list[tuple[ast.expr, bool]] = []  # under which what is being written is reached

    # What can be understood of an expression

    def run_of(self, value: ast.expr) -> _Run:
        """``c(b(a(x)))`` as calls of a, b and c on x; a sum at its root too."""
        steps: list[ast.expr] = []
        while (step := self._step(value)) is not None:
            steps.insert(0, step)
            value = value.args[0]
        return _Run(value, steps)

    def _step(self, value: ast.expr) -> ast.expr | None:
        """What is called with one argument, if looking it up has no effect."""
        if not isinstance(value, ast.Call) or len(value.args) != 1 or isinstance(value.args[0], ast.Starred):
            return None
        if not self._is_path(value.func):
            return None
        if not value.keywords:
            return value.func
        if all(word.arg and isinstance(word.value, ast.Constant) for word in value.keywords):
            return ast.Call(_load(PARTIAL_NAME), [value.func], value.keywords)
        return None

    def _is_path(self, value: ast.expr) -> bool:
        root = _root(value)
        if root != self.own:
            return root is not None and root not in self.locals
        while isinstance(value, (ast.Attribute, ast.Subscript)) and not isinstance(value.value, ast.Name):
            value = value.value
        # A method or property may change what is looked up next.
        found = (
            inspect.getattr_static(self.kind, value.attr, None) if isinstance(value, ast.Attribute) else self
        )
        return not (callable(found) or hasattr(type(found), "__get__") or found is self)

    def _is_condition(self, test: ast.expr) -> bool:
        """It asks the module's attributes, or whether something is None."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self._is_condition(test.operand)
        if isinstance(test, ast.BoolOp):
            return all(map(self._is_condition, test.values))
        if (
            isinstance(test, ast.Compare)
            and len(test.ops) == 1
            and isinstance(test.comparators[0], ast.Constant)
        ):
            identity = isinstance(test.ops[0], (ast.Is, ast.IsNot))
            return self._is_path(test.left) or (identity and isinstance(test.left, ast.Name))
        return self._is_path(test)

    def _callees(self, node: ast.AST) -> list[ast.expr] | None:
        """What an expression or statement calls, None for what a condition leaves out.

        None if it does anything but call layers, choose and assign.
        """
        if isinstance(node, (ast.If, ast.IfExp)):
            if not self._is_condition(node.test):
                return None
            found = []
            for part, wanted in ((node.body, True), (node.orelse, False)):
                inner = self._callees_of(part if isinstance(part, list) else [part])
                if inner is None:
                    return None
                nothing = ast.Constant(None)
                found += [ast.IfExp(node.test, *((c, nothing) if wanted else (nothing, c))) for c in inner]
            return found
        if isinstance(node, ast.Call):
            if self._step(node) is None or _root(node.func) != self.own:
                return None
            inner = self._callees(node.args[0])
            return None if inner is None else [*inner, node.func]
        if isinstance(node, ast.Assign):
            return None if _target(node) is None else self._callees(node.value)
        return [] if isinstance(node, (ast.Constant, ast.Name)) or _root(node) is not None else None

    def _callees_of(self, nodes: Sequence[ast.AST]) -> list[ast.expr] | None:
        found = [self._callees(node) for node in nodes]
        return None if None in found else [callee for inner in found for callee in inner]

    # Blocks

    def block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        statements = [part for s in statements for part in self._as_branches(s)]
        result: list[ast.stmt] = []
        index = 0
        while index < len(statements):
            statement = statements[index]
            run = self._start(statement)
            if run is None:
                result.append(self._inner(statement))
                index += 1
                continue
            written, used = self._grow(run, statements, index)
            result += written
            index += used
        return result

    def _as_branches(self, statement: ast.stmt) -> list[ast.stmt]:
        """``return a if c else b`` as two returns."""
        value = statement.value if isinstance(statement, ast.Return) else None
        if isinstance(value, ast.IfExp) and self._is_condition(value.test):
            return [ast.If(value.test, [ast.Return(value.body)], [ast.Return(value.orelse)])]
        return [statement]

    def _inner(self, statement: ast.stmt) -> ast.stmt:
        if isinstance(statement, (ast.If, ast.For, ast.While)):
            statement = copy.copy(statement)
            test = statement.test if isinstance(statement, ast.If) else None
            with self._under(test, True):
                statement.body = self.block(statement.body)
            with self._under(test, False):
                if getattr(statement, "orelse", None):
                    statement.orelse = self.block(statement.orelse)
        return statement

    @contextlib.contextmanager
    def _under(self, test: ast.expr | None, wanted: bool) -> Iterator[None]:
        """What is written in the block is reached where a test gives that."""
        known = len(self.conditions)
        self.conditions += [] if test is None else [(test, wanted)]
        yield
        del self.conditions[known:]

    def _start(self, statement: ast.stmt) -> _Run | None:
        """The run that a statement begins: ``name = ...`` or ``return ...`` of calls, or of a sum."""
        if not isinstance(statement, ast.Return) and _target(statement) is None:
            return None
        if statement.value is None:
            return None
        run = self.run_of(statement.value)
        if isinstance(run.base, ast.BinOp) and isinstance(run.base.op, ast.Add):
            total = self._sum(run.base.left, run.base.right)
            return None if total is None else _Run(total, run.steps)
        return run if run.steps else None

    def _sum(self, left: ast.expr, right: ast.expr) -> _Sum | None:
        """A sum of which one operand is calls: they are the last to be evaluated."""
        runs = self.run_of(left), self.run_of(right)
        if runs[1].steps and not isinstance(runs[1].base, ast.BinOp):
            return _Sum(left, runs[1], False, runs[1].steps)
        if (
            runs[0].steps
            and isinstance(right, (ast.Name, ast.Constant))
            and not isinstance(runs[0].base, ast.BinOp)
        ):
            return _Sum(runs[0], right, False, runs[0].steps)
        return None

    def _grow(self, run: _Run, statements: list[ast.stmt], index: int) -> tuple[list[ast.stmt], int]:
        """Takes into the run what follows; returns what to write, and how many statements that stands for."""
        first, at = statements[index], index + 1
        name = _target(first)
        written: list[ast.stmt] = []
        while name is not None and at < len(statements):
            following = statements[at]
            if self._extends(run, name, following):
                at += 1
                if isinstance(following, ast.Return):
                    return [*written, ast.Return(self._written(run))], at - index
                name = _target(following) or name
                continue
            rest = statements[at + 1 :]
            if self._goes_into_branches(name, following, rest):
                branches = [[*block, *rest] for block in (following.body, following.orelse)]
                pair = []
                for wanted, block in zip((True, False), branches):
                    with self._under(following.test, wanted):
                        pair.append(self._branch(name, copy.deepcopy(run), block))
                return [*written, ast.If(following.test, *pair)], len(statements) - index
            found = self._find_sum(run, name, statements, at)
            if found is None:
                break
            run, more, at, name = found
            written += more
            if name is None:
                return [*written, ast.Return(self._written(run))], at - index
        if name is None:
            return [ast.Return(self._written(run, first.value))], 1
        value = first.value if at == index + 1 and not written else None
        return [*written, ast.Assign([ast.Name(name, ast.Store())], self._written(run, value))], at - index

    def _branch(self, name: str, run: _Run, block: list[ast.stmt]) -> list[ast.stmt]:
        first = ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None))
        block = [part for s in block for part in self._as_branches(s)]
        written, used = self._grow(run, [first, *block], 0)
        if used == 1 and isinstance(written[-1], ast.Assign) and isinstance(written[-1].value, ast.Constant):
            written[-1].value = self._written(run)
        return [*written, *self.block(block[used - 1 :])]

    def _goes_into_branches(self, name: str, following: ast.stmt, rest: list[ast.stmt]) -> bool:
        """Whether an ``if`` ends the block, but for a return: both branches can begin with the run."""
        return (
            isinstance(following, ast.If)
            and self._is_condition(following.test)
            and not _mentions(name, following.test)
            and (not rest or (len(rest) == 1 and isinstance(rest[0], ast.Return)))
            and bool(rest or following.orelse)
            and any(_mentions(name, s) for s in following.body)
        )

    def _extends(self, run: _Run, name: str, following: ast.stmt) -> bool:
        """Appends ``name = call(name)``, ``return call(name)``, ``return name``, or a conditional call."""
        if isinstance(following, ast.Return) or _target(following) == name:
            value = following.value
            if value is None:
                return False
            more = self.run_of(value)
            if not (isinstance(more.base, ast.Name) and more.base.id == name):
                return False
            run.steps += more.steps
            return bool(more.steps) or isinstance(following, ast.Return)
        if not (isinstance(following, ast.If) and len(following.body) == 1 and not following.orelse):
            return False
        inner = following.body[0]
        if (
            _target(inner) != name
            or not self._is_condition(following.test)
            or _mentions(name, following.test)
        ):
            return False
        more = self.run_of(inner.value)
        if not (more.steps and isinstance(more.base, ast.Name) and more.base.id == name):
            return False
        nothing = ast.Constant(...)
        run.steps += [ast.IfExp(copy.deepcopy(following.test), step, nothing) for step in more.steps]
        return True

    def _find_sum(
        self, run: _Run, name: str, statements: list[ast.stmt], at: int
    ) -> tuple[_Run, list[ast.stmt], int, str | None] | None:
        """A sum with what ``name`` is, perhaps after statements that call layers for other names."""
        if isinstance(run.base, _Sum) and not run.steps:
            return None
        between: list[ast.expr] = []
        start = at
        while at < len(statements):
            statement = statements[at]
            found = self._sum_in(statement, name)
            if found is not None:
                total, after, target = found
                total.steps = run.steps
                other = (
                    total.right if isinstance(total.left, ast.Name) and total.left.id == name else total.left
                )
                callees = self._callees(other)
                if callees is None or _mentions(name, other):
                    return None
                if not any(_root(step) == self.own for step in run.steps if not isinstance(step, ast.IfExp)):
                    return None
                pending = ast.Assign([ast.Name(name, ast.Store())], self._defer(run, between + callees))
                more = [pending, *map(self._inner, statements[start:at])]
                return _Run(total, after), more, at + 1, target
            callees = self._callees(statement)
            kinds = (ast.Assign, ast.If)
            if callees is None or not isinstance(statement, kinds) or _mentions(name, statement):
                return None
            between += callees
            at += 1
        return None

    def _sum_in(self, statement: ast.stmt, name: str) -> tuple[_Sum, list[ast.expr], str | None] | None:
        """The sum, the calls on it, and the name that is set, None for a return."""
        if isinstance(statement, ast.AugAssign):
            target = statement.target
            if not (isinstance(statement.op, ast.Add) and isinstance(target, ast.Name) and target.id == name):
                return None
            return _Sum(_load(name), statement.value, True), [], name
        if not isinstance(statement, ast.Return) and _target(statement) != name:
            return None
        if statement.value is None:
            return None
        run = self.run_of(statement.value)
        if not (isinstance(run.base, ast.BinOp) and isinstance(run.base.op, ast.Add)):
            return None
        operands = run.base.left, run.base.right
        if not any(isinstance(o, ast.Name) and o.id == name for o in operands):
            return None
        return _Sum(*operands, False), run.steps, _target(statement)

    # What is written

    def _note(self, steps: list[Any]) -> None:
        self.places.append((list(self.conditions), steps))

    def _written(self, run: _Run, original: ast.expr | None = None) -> ast.expr:
        """The call that does a run; ``original``, if it would gain nothing."""
        if isinstance(run.base, _Sum):
            total = run.base
            sides = [self._defer(s, []) if isinstance(s, _Run) else s for s in (total.left, total.right)]
            self._note([*total.steps, SUM, *run.steps])
            return _call(ADD_NAME, *sides, ast.Constant(total.inplace), _tuple(run.steps))
        if original is not None and (len(run.steps) == 1 and not isinstance(run.steps[0], ast.IfExp)):
            return original
        if not run.steps:
            return run.base
        self._note(run.steps)
        return _call(RUN_NAME, _tuple(run.steps), run.base)

    def _defer(self, run: _Run, between: list[ast.expr]) -> ast.expr:
        base = self._written(_Run(run.base)) if isinstance(run.base, _Sum) else run.base
        return _call(DEFER_NAME, _tuple(run.steps), base, _tuple(between))
