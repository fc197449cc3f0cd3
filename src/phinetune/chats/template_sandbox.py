"""The Jinja environment in which a chat template renders: transformers' own, with a limit on time, memory and output.

transformers' sandbox keeps a template from code and files. But `{{ 'x' * 10**10 }}` or three nested loops take all
memory, or never end. Here, all that can grow or repeat is counted, see `phinetune.chats.template_budget`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phinetune.chats.template_budget import STEP, Budget, amount, format_amount, size, weigh

# Filters and methods whose result, or whose time, is their value times an argument.
GROWING = frozenset(
    [
        *("batch", "center", "expandtabs", "format", "format_map", "groupby", "indent", "join", "ljust", "map", "max"),
        *("min", "reject", "rejectattr", "replace", "rjust", "round", "select", "selectattr", "slice", "sort", "sum"),
        *("to_bytes", "tojson", "translate", "truncate", "unique", "urlencode", "zfill"),
    ]
)
FORMATS = ("format", "format_map")
# Filters that look at the uppermost level of their value only.
SHALLOW = frozenset(
    [
        *("batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map"),
        *("max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum"),
        "unique",
    ]
)
# Filters and globals that no chat needs, and that take quadratic time or make text of any length.
LEFT_OUT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
LEFT_OUT_GLOBALS = ("lipsum",)
TEXTS = frozenset({"format", "join", "lower", "replace", "string", "tojson", "trim", "upper"})  # filters that give text
COMPARING_TESTS = (
    *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lt", "ne"),
    *("lower", "upper"),
)
FREE_TERMS = 4  # of a sum that is written at once, constants apart
BITS = 20_000  # of a whole number; Python writes numbers of up to 14,000 bits


class CountingGenerator(CodeGenerator):
    """Jinja's compiler, which also writes the calls that count."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._written: set[int] = set()  # sums that are written at once, by their identity

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        """A block. The body of a loop or a macro may repeat, so it costs a step, and more if it is long."""
        block = list(nodes_)
        if not frame.soft_frame:  # the body of a condition has a soft frame
            long = sum(1 for node in block for _ in node.find_all(nodes.Stmt))
            self.writeline(f"environment.budget.left -= {STEP + long}")
            self.writeline("if environment.budget.left < 0: environment.budget.look()")
        super().blockvisit(block, frame)

    def buffer(self, frame: Frame) -> None:
        """Where a macro or a `set` block collects its text."""
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.buffer()")

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        """`{{ … }}` and the text between. A short sum is counted by its letters when it is written."""
        for child in node.nodes:
            terms = _terms(child)
            if sum(not isinstance(term, nodes.Const) for term in terms) <= FREE_TERMS:
                self._written.add(id(child))
        super().visit_Output(node, frame)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if _is_text(node) or frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
            self.write("(" if _is_text(node) else "environment.made(")
        else:
            self.write("environment.text((")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")")
        super()._output_child_post(node, frame, finalize)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """A sum: `a + b + c` is one call."""
        terms = _terms(node)
        if id(node) not in self._written:
            self._call("add", terms, frame)
            return
        self.write("(")
        for i, term in enumerate(terms):
            self.write(" + " if i else "")
            self.visit(term, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`: each part is counted before they are joined."""
        escapes = frame.eval_ctx.volatile or frame.eval_ctx.autoescape
        self.write("(markup_join if context.eval_ctx.autoescape else str_join)((" if escapes else "str_join((")
        for part in node.nodes:
            self._call("made", [part], frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """An item, or a slice, which is a copy."""
        self._counted("copied", super().visit_Getitem, node, frame, isinstance(node.arg, nodes.Slice))

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """A list. It may hold another many times over."""
        self._counted("made", super().visit_List, node, frame, not _is_constant(node))

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """A tuple: a value, or names that values are given to."""
        self._counted("made", super().visit_Tuple, node, frame, node.ctx == "load" and not _is_constant(node))

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """A dictionary."""
        self._counted("made", super().visit_Dict, node, frame, bool(node.items))

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """A comparison. With a constant it takes no time."""
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if any(_is_constant(side) for side in sides):
            super().visit_Compare(node, frame)
            return
        self.write("(")
        self._call("copied", [node.expr], frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        """The right side of a comparison. `in` goes through all of it."""
        if node.op in ("in", "notin") and not _is_constant(node.expr):
            self.write(" in " if node.op == "in" else " not in ")
            self._call("copied", [node.expr], frame)
        else:
            super().visit_Operand(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """A loop. One with a condition may run through without its body."""
        if node.test is not None:
            listed = nodes.EnvironmentAttribute("listed", lineno=node.lineno)
            node.iter = nodes.Call(listed, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def _counted(self, by: str, visit: Callable[..., None], node: nodes.Node, frame: Frame, counts: bool) -> None:
        self.write(f"environment.{by}(" if counts else "(")
        visit(node, frame)
        self.write(")")

    def _call(self, name: str, arguments: Iterable[nodes.Expr], frame: Frame) -> None:
        self.write(f"environment.{name}(")
        for argument in arguments:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget. Fill it up before each chat, see `Budget.refill`."""

    code_generator_class = CountingGenerator
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.budget = Budget()
        self.spend = self.budget.spend
        for name in LEFT_OUT_FILTERS:
            del self.filters[name]
        for name in LEFT_OUT_GLOBALS:
            del self.globals[name]
        for name in COMPARING_TESTS:
            self.tests[name] = self.limited(name, cast(Any, self.tests[name]))
        for name in list(self.filters):
            self.filters[name] = self.limited(name, cast(Any, self.filters[name]))

    def limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or a test whose work is counted before it begins."""
        place = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja hands the context, or itself, first
        measure = size if name in SHALLOW else weigh

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            given = args[place:]
            if any(type(value) is not str for value in given):  # a sequence still to be made has no length yet
                given = tuple(list(value) if isinstance(value, Iterator) else value for value in given)
                args = (*args[:place], *given)
            if given:
                own = format_amount(str(given[0])) if name == "format" else measure(given[0])
                self._charge(name, own * own if name == "sum" else own, [*given[1:], *kwargs.values()])
            return function(*args, **kwargs)

        return counted

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, a macro or a method."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        name = getattr(obj, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            own = format_amount(str(owner)) if name in FORMATS else amount(owner)
            self._charge(name, own, [*args, *kwargs.values()])
        else:
            self.spend(STEP + sum(map(size, args)) + sum(map(size, kwargs.values())))
        return super().call(context, obj, *args, **kwargs)

    def _charge(self, name: str, own: int, others: list[Any]) -> None:
        if name in GROWING:
            left, most = self.budget.units, 0
            for one in others:
                most = max(most, len(one) if type(one) is str else amount(one, left))
            self.spend((1 + own) * (1 + most))
        else:
            self.spend(STEP + own + sum(map(size, others)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`*`, `**` or `%`: the three that grow by more than a sum."""
        budget = self.budget.units
        if all(isinstance(side, (int, float)) for side in (left, right)):
            self.spend(STEP)
            _check_number(operator, left, right)
        elif operator == "%":
            self.spend((1 + format_amount(str(left))) * (1 + amount(right, budget)))
        else:
            self.spend(STEP + amount(left, budget) * amount(right, budget))
        return super().call_binop(context, operator, left, right)

    def add(self, first: Any, *others: Any) -> Any:
        """`first + …`, each sum counted."""
        for other in others:
            first = first + other
            self.spend(len(first) if type(first) is str else size(first))
        return first

    def buffer(self) -> list[str]:
        """An empty buffer for text."""
        return _Buffer(self.spend)

    def text(self, value: Any) -> str:
        """`value` as it is written."""
        return value if type(value) is str else str(self.made(value))

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """`values` as a list, counted."""
        made = list(values)
        self.spend(STEP + len(made))
        return made

    def made(self, value: Any) -> Any:
        """`value`, counted as a whole."""
        self.spend(len(value) if type(value) is str else weigh(value, self.budget.units))
        return value

    def copied(self, value: Any) -> Any:
        """`value`, counted at its uppermost level."""
        self.spend(size(value))
        return value


class _Buffer(list[str]):
    """Collects the text of a macro or of a `set` block, counted."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        super().__init__()
        self._spend = spend

    def append(self, text: str) -> None:
        self._spend(len(text))
        super().append(text)

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.append(text)


def _is_text(node: nodes.Node) -> bool:
    """Whether its value is text, which is counted by its letters when it is written."""
    if isinstance(node, nodes.CondExpr) and node.expr2 is not None:
        return _is_text(node.expr1) and _is_text(node.expr2)
    return isinstance(node, (nodes.Const, nodes.Concat)) or (isinstance(node, nodes.Filter) and node.name in TEXTS)


def _is_constant(node: nodes.Node) -> bool:
    """Whether it stands in the template as it is, so that it is no longer than the template."""
    parts = node.items if isinstance(node, (nodes.List, nodes.Tuple)) else [node]
    return all(isinstance(part, nodes.Const) for part in parts)


def _terms(node: nodes.Node) -> list[nodes.Expr]:
    """The terms of a sum, from left to right; a single one for what is no sum."""
    terms: list[nodes.Expr] = []
    while isinstance(node, nodes.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]  # type: ignore[list-item]


def _check_number(operator: str, left: float, right: float) -> None:
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    if bits > BITS:
        raise SecurityError(f"it computes a number of more than {BITS:,} bits")
