"""A function's syntax tree, if that is what runs; and a function made of another tree."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_INTROSPECTION = {"locals", "vars", "eval", "exec", "dir", "globals"}


def node_of(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function whose source is still what runs."""
    if type(function) is not FunctionType:
        return None
    code = function.__code__
    if code.co_argcount == 0 or code.co_flags & _GENERATORS or code.co_cellvars or code.co_freevars:
        return None
    if _INTROSPECTION & set(code.co_names):
        return None
    try:
        lines, _ = inspect.findsource(function)
        tree, whole = _compiled("".join(lines), code.co_filename)
    except (OSError, TypeError, SyntaxError):
        return None
    if code not in _codes_in(whole) or any(map(_is_private, code.co_names)):
        return None
    found = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.lineno == code.co_firstlineno)
    node = next((n for n in found if n.name == code.co_name and not n.decorator_list), None)
    return None if node is None or _rebinds(node, code.co_varnames[0]) else copy.deepcopy(node)


def _rebinds(node: ast.FunctionDef, own: str) -> bool:
    """Whether it gives its module's name to something else, or assigns to what is not local."""
    return any(
        isinstance(n, (ast.Global, ast.Nonlocal))
        or (isinstance(n, ast.Name) and n.id == own and not isinstance(n.ctx, ast.Load))
        for n in ast.walk(node)
    )


def _is_private(name: str) -> bool:
    """Which a class makes longer, and a function that is compiled by itself does not."""
    return re.match(r"_.+__", name) is not None and not name.endswith("__")


@functools.lru_cache(maxsize=16)
def _compiled(source: str, filename: str) -> tuple[ast.Module, CodeType]:
    tree = ast.parse(source)
    return tree, compile(tree, filename, "exec", dont_inherit=True)


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes_in(const)


def _bare(node: ast.FunctionDef) -> ast.Module:
    """The function without defaults and annotations, which are evaluated elsewhere."""
    node = copy.deepcopy(node)
    arguments = node.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kw_defaults)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    node.returns = None
    return ast.Module([node], [])


def function_with(
    function: FunctionType, node: ast.FunctionDef, body: list[ast.stmt], helpers: dict[str, Any]
) -> FunctionType:
    """The function with another body, in which the helpers have names."""
    inner = copy.copy(node)
    inner.body = body
    (inner,) = _bare(inner).body
    inner.name = "forward"
    arguments = ast.arguments([], [ast.arg(name) for name in helpers], None, [], [], None, [])
    outer = ast.FunctionDef(
        "outer", arguments, [inner, ast.Return(ast.Name("forward", ast.Load()))], [], None
    )
    tree = ast.fix_missing_locations(ast.Module([outer], []))
    names: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec", dont_inherit=True), function.__globals__, names)
    made = names["outer"](*helpers.values())
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made
