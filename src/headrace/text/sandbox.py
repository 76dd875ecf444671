"""Jinja for templates that nobody here wrote, run on messages that nobody here vetted.

Jinja's own sandbox keeps a template away from Python's internals. This one also bounds what it can spend:
every loop, call, filter, operator and string it builds is paid for out of a budget, before the work is done
where the size can be known before. So a template can neither hang nor fill the memory: the worst that are
known take a second or two. No clock is read: the same template fails on the same input everywhere.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Final, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .allowance import MAX_INTEGER_BITS, STEP_WORK, announce, checked, joined_lists, length_of, pay, size_of

MAX_COUNT: Final = 10_000
"""Largest count that may be given to a filter that makes output in proportion to it."""

_FILTERS: Final = frozenset(
    {
        "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
        "float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length",
        "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
        "select", "selectattr", "slice", "sort", "string", "title", "trim", "truncate", "unique", "upper",
        "urlencode", "wordcount",
    }
)  # fmt: skip
"""Jinja's own filters without those that can cost far more than they are given and that no template needs."""
_COUNTED_FILTERS: Final = frozenset({"batch", "indent", "slice", "truncate"})
_SHALLOW: Final = frozenset(
    {
        "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject",
        "rejectattr", "reverse", "select", "selectattr", "slice", "defined", "undefined", "none", "string",
        "mapping", "iterable", "sequence", "number", "callable", "true", "false", "boolean", "sameas",
    }
)  # fmt: skip
"""Filters and tests that do not look inside the values of a list, and so cost no more for large ones."""
_DENIED_METHODS: Final = frozenset(
    {"ljust", "rjust", "center", "zfill", "expandtabs", "translate", "to_bytes"}
)
_WIDE_FORMAT: Final = re.compile(r"\d{4,}|\*|:[^{}]*\{")
"""Widths of four digits, widths taken from the arguments, and fields inside a format specification."""


class SandboxedTemplates(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled in. Compile and render inside `budget()`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, globals: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=checked,
        )
        kept: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        kept |= {"sum": _sum, **filters}
        self.filters = {name: _paid(name, function) for name, function in kept.items()}
        self.tests = {name: _paid(name, cast(Any, function)) for name, function in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": _Dict(),
            "namespace": _Namespace,
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            **globals,
        }

    def compile_bounded(self, source: str) -> Any:
        """A template whose every loop, comparison and concatenation goes through this environment."""
        tree = _Bounded().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _DENIED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str:  # most of what templates do
            announce(len(left) + len(right))
            return checked(left + right)
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "*":
            announce(_product(left, right))
        elif operator == "**":
            _check_power(left, right)
        elif operator == "+" and isinstance(left, list) and isinstance(right, list):
            # Templates gather messages one by one this way: what is in them is paid for when it is looked at.
            return joined_lists(left, right)
        elif operator == "+":
            announce(size_of(left) + size_of(right))
        return checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        @wraps(formatted)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [args, kwargs])
            return formatted(*args, **kwargs)

        return bounded

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        pay()
        if isinstance(obj, LoopContext):
            args = (self.bounded_items(args[0]), *args[1:])
        if getattr(obj, "__self__", None) is self:
            return obj(*args)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str | bytes):
            pay(len(owner))
            if name == "replace" and len(args) >= 2:
                announce(_replaced(owner, args[0], args[1]))
            elif name == "join" and args:
                args = (items := list(args[0]), *args[1:])
                announce(size_of(items) + len(owner) * len(items))
        return checked(super().call(context, obj, *args, **kwargs))

    # ---- reached from compiled templates, by `_Bounded` ----

    def bounded_items(self, iterable: Iterable[Any]) -> list[Any]:
        """What a loop runs over, paid for in advance."""
        items = list(iterable)
        pay(STEP_WORK * len(items))
        return items

    def bounded_concat(self, *values: Any) -> str:
        """The `~` operator."""
        announce(sum(size_of(value) for value in values))
        return "".join(map(str, values))

    def bounded_operand(self, value: Any) -> Any:
        """A side of a comparison."""
        pay(size_of(value))
        return value

    def bounded_slice(self, value: Any) -> Any:
        """What a slice is taken of."""
        pay(length_of(value))
        return value

    def bounded_literal(self, value: Any) -> Any:
        """A list, tuple or mapping that a template spells out."""
        return checked(value)

    def concat(self, parts: Iterable[str]) -> str:
        """How rendered pieces become a string: of the whole template, a macro, or a `set` block."""
        pieces = list(parts)
        announce(sum(map(len, pieces)))
        return "".join(pieces)


def _check_format(template: str, values: Any) -> None:
    if _WIDE_FORMAT.search(template):
        raise SecurityError("it formats with a width or precision that is too large or not a constant")
    fields = template.count("{") + template.count("%")
    announce(len(template) + fields * (1000 + size_of(values)))


def _product(left: Any, right: Any) -> int:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
            return max(0, count) * max(1, size_of(sequence))
    return 1


def _check_power(base: Any, exponent: Any) -> None:
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and base.bit_length() * exponent > MAX_INTEGER_BITS
    ):
        raise SecurityError(f"it makes an integer of more than {MAX_INTEGER_BITS} bits")


def _replaced(text: Any, old: Any, new: Any) -> int:
    return int(len(text) + text.count(old) * len(new))


def _sum(values: Iterable[Any], attribute: str | None = None, start: float = 0) -> float:
    """Of numbers: adding up lists takes time that grows with the square of their length."""
    if attribute is not None:
        values = [value[attribute] for value in values]
    return sum((float(value) if isinstance(value, float) else int(value) for value in values), start)


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a filter or a test, with its arguments and its outcome paid for."""

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        weigh = length_of if name in _SHALLOW else size_of
        pay(sum(map(weigh, given)) + sum(map(weigh, kwargs.values())))
        options = [*given[1:], *kwargs.values()]
        if name in _COUNTED_FILTERS:
            for option in options:
                if size_of(option) > MAX_COUNT or (isinstance(option, int) and option > MAX_COUNT):
                    raise SecurityError(f"it gives the filter {name!r} a count above {MAX_COUNT}")
        if name == "indent" and given:
            widths = [option if isinstance(option, int) else len(option) for option in options[:1]] or [4]
            announce(len(str(given[0])) + (str(given[0]).count("\n") + 1) * widths[0])
        elif name == "replace" and len(given) >= 3:
            announce(_replaced(str(given[0]), str(given[1]), str(given[2])))
        elif name == "join" and given:
            items = list(given[0])
            args = tuple(items if value is given[0] else value for value in args)
            separators = [str(option) for option in options]
            announce(size_of(items) + len(items) * max((len(text) for text in separators), default=0))
        elif name == "format":
            _check_format(str(given[0]), [given[1:], kwargs])
        return checked(function(*args, **kwargs))

    return paid


class _Bounded(NodeTransformer):
    """Sends through the environment what Jinja compiles to plain Python."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("bounded_items", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("bounded_concat", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _through("bounded_operand", node.expr)
        for operand in node.ops:
            operand.expr = _through("bounded_operand", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("bounded_slice", node.node)
        return node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through("bounded_literal", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("bounded_literal", node) if node.ctx == "load" else node


def _through(method: str, *arguments: nodes.Node) -> nodes.Call:
    attribute = nodes.EnvironmentAttribute(method)
    return nodes.Call(attribute, list(arguments), [], None, None, lineno=arguments[0].lineno)


class _Dict:
    """The `dict` that templates see: a maker of dictionaries without the type's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, which Python gives a meaning."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _check_attribute(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, with which templates mark for trainers what the model wrote."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
