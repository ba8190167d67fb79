"""jinja2's sandbox with the checks of `groupwise.templates.bounded` in what it compiles; imported late."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import generate
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from groupwise.templates.bounded import (
    bounded,
    bounded_items,
    check_brace_format,
    check_join,
    check_operation,
    check_percent_format,
    check_replace,
    check_size,
    check_time,
    check_widths,
    is_limited,
    one_call,
    weight,
    written,
)

_LOOP, _VALUE = "groupwise_loop", "groupwise_value"
_FILLING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_FILLING_FILTERS = frozenset({"batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap"})
_MOST_OPERANDS = 16  # of one concatenation, which is checked once it is made
_MOST_WORDS = 1000
_MOST_ADDED = 160_000


class CountingEnvironment(ImmutableSandboxedEnvironment):
    """In place of the sandbox that transformers compiles chat templates with."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = _CheckedFilters(self.filters)
        self.finalize = written
        # Not checked in their turn: they are the checks.
        dict.update(self.filters, {_LOOP: _loop, _VALUE: _value})

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        checked: nodes.Template = _Checks().visit(source)
        # Without the optimizer, which would compute constant parts while it compiles, unchecked.
        return generate(checked, self, name, filename, defer_init=defer_init, optimized=False) or ""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if is_limited():
            check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_limited():
            return super().call(__context, __obj, *args, **kwargs)
        with one_call():
            args = _checked_arguments(__obj, args, kwargs)
            return _checked_result(super().call(__context, __obj, *args, **kwargs))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        return "".join(bounded_items(pieces) if is_limited() else pieces)


class _Checks(NodeTransformer):
    """Puts a check around what loops go through, and around values that are put together."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _LOOP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts: list[nodes.Expr] = list(node.nodes)
        while len(parts) > _MOST_OPERANDS:
            chunks = [parts[start : start + _MOST_OPERANDS] for start in range(0, len(parts), _MOST_OPERANDS)]
            parts = [*(_filtered(nodes.Concat(chunk, lineno=node.lineno), _VALUE) for chunk in chunks)]
        node.nodes = parts
        return _filtered(node, _VALUE)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _VALUE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _VALUE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _VALUE) if node.ctx == "load" else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# With the context as an argument, so that jinja2 does not compute them while it compiles.
@pass_context
def _loop(context: Context, items: Any) -> Any:
    if not is_limited():
        return items
    iter(items)  # what cannot be gone through says so itself
    return _Counted(items) if hasattr(items, "__len__") else _with_clock(items)


@pass_context
def _value(context: Context, value: Any) -> Any:
    return bounded(value) if is_limited() else value


class _Counted:
    """Items with the clock beside them; their number is known without going through them, as before."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return _with_clock(self._items)

    def __len__(self) -> int:
        return len(self._items)


def _with_clock(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        check_time()
        yield item


class _CheckedFilters(dict[str, Callable[..., Any]]):
    """Filters by name, each between its checks; transformers adds its own later."""

    def __init__(self, filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__({name: _checked_filter(name, function) for name, function in filters.items()})

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _checked_filter(name, function))


def _checked_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # jinja2 marks filters that take an environment or a context first; `wraps` keeps the mark.
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not is_limited() or len(args) <= place:
            return function(*args, **kwargs)
        check_time()
        value, more = args[place], [*args[place + 1 :], *kwargs.values()]
        if name in ("join", "sum") and not isinstance(value, str):
            value = list(bounded_items(value))
        _check_filter(name, value, more)
        return _checked_result(function(*args[:place], value, *args[place + 1 :], **kwargs))

    return checked


def _check_filter(name: str, value: Any, more: list[Any]) -> None:
    if name in _FILLING_FILTERS:
        check_widths(more)
    if name in ("center", "indent", "truncate", "wordwrap", "replace", "xmlattr", "urlize", "pprint"):
        check_size(weight(value))
    if name == "indent" and more and isinstance(more[0], int | str):
        width = more[0] if isinstance(more[0], int) else len(more[0])
        check_size(width * str(value).count("\n"))
    elif name == "format":
        check_percent_format(str(value), more)
    elif name == "replace" and len(more) > 1:
        check_replace(str(value), *map(str, more[:2]))
    elif name == "join":
        check_join(more[0] if more else "", value)
    elif name == "sum" and any(isinstance(start, list | tuple) for start in more):
        check_size(weight(value) * (1 + weight(value) // _MOST_ADDED * 100))  # every addition copies what came before


def _checked_arguments(called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What it is called with, once that is known to give nothing too large."""
    method = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if name == "generate_lorem_ipsum":
        check_widths([*args, *kwargs.values()], most=_MOST_WORDS)
    if not isinstance(text, str):
        return args
    if name == "join" and args:
        items = list(bounded_items(args[0]))
        check_join(text, items)
        return (items, *args[1:])
    if name == "replace" and len(args) > 1:
        check_replace(text, *args[:2])
    elif name in ("format", "format_map"):
        check_brace_format(text, [*args, *kwargs.values()])
    elif name == "translate":
        check_size(len(text) * weight([*args]))
    elif name in _FILLING_METHODS:
        check_widths([*args, *kwargs.values()])
        if name == "expandtabs":
            check_size(text.count("\t") * int(next(iter([*args, *kwargs.values()]), 8)))
    return args


def _checked_result(result: Any) -> Any:
    return bounded_items(result) if isinstance(result, Iterator) else bounded(result)
