"""Jinja for templates that nobody here wrote, run on messages that nobody here vetted.

Jinja's own sandbox keeps a template away from Python's internals. This one also bounds what it can spend:
every loop, call, filter, operator and string it builds is paid for out of a budget, before the work is done
where the size can be known before. So a template can neither hang nor fill the memory: the worst that are
known take a second or two. No clock is read: the same template fails on the same input everywhere.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
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

MAX_CHARACTERS: Final = 8_000_000
"""Largest string that a template may make, and largest output."""
MAX_PARTS: Final = 500_000
"""Most values that a list or mapping may hold, with everything inside it."""
MAX_WORK: Final = 250_000_000
"""Budget of one rendering, in characters copied."""
STEP_WORK: Final = 250
"""What any single operation costs besides."""
PART_WORK: Final = 100
"""What looking at one part of a list or mapping costs."""
MAX_COUNT: Final = 10_000
"""Largest count that may be given to a filter that makes output in proportion to it."""
MAX_INTEGER_BITS: Final = 256

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
_DENIED_METHODS: Final = frozenset(
    {"ljust", "rjust", "center", "zfill", "expandtabs", "translate", "to_bytes"}
)
_WIDE_FORMAT: Final = re.compile(r"\d{4,}|\*|:[^{}]*\{")
"""Widths of four digits, widths taken from the arguments, and fields inside a format specification."""

_CONTAINERS: Final = (list, tuple, dict, set, frozenset)

_budget: ContextVar["_Budget"] = ContextVar("template budget")


class _Budget:
    """What one rendering may still spend, and the sizes of the containers that it was given."""

    def __init__(self) -> None:
        self.left = MAX_WORK
        self.known: dict[int, int] = {}

    def spend(self, characters: int) -> None:
        self.left -= STEP_WORK + characters
        if self.left < 0:
            raise SecurityError(f"it does more than the work of copying {MAX_WORK} characters")

    def learn(self, value: Any) -> int:
        """Size of an input with everything inside it, remembered for each container in it: inputs outlive the
        rendering and do not change, and templates ask for the length of the conversation at every turn."""
        if isinstance(value, dict):
            size = 1 + sum(map(self.learn, value)) + sum(map(self.learn, value.values()))
        elif isinstance(value, list | tuple):
            size = 1 + sum(map(self.learn, value))
        else:
            return len(value) if isinstance(value, str) else 1
        self.known[id(value)] = size
        return size


@contextmanager
def budget(inputs: Mapping[str, Any] | None = None) -> Iterator[None]:
    """One rendering's allowance; whatever the environment does inside is paid from it. `inputs` are the
    variables that the template will be given."""
    allowance = _Budget()
    for value in (inputs or {}).values():
        allowance.learn(value)
    token = _budget.set(allowance)
    try:
        yield
    finally:
        _budget.reset(token)


def _pay(characters: int = 0) -> None:
    _budget.get().spend(characters)


def _size(value: Any) -> int:
    """Characters and parts of `value` with everything inside it. Shared parts count each time, as they would
    when written out. Raises `SecurityError` beyond the limits."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise SecurityError(f"it makes an integer of more than {MAX_INTEGER_BITS} bits")
        return 1
    if not isinstance(value, _CONTAINERS):
        return 1
    known = _budget.get().known
    parts = size = 0
    waiting: list[Any] = [value]
    while waiting:
        part = waiting.pop()
        parts += 1
        if isinstance(part, str | bytes):
            size += len(part)
        elif id(part) in known:
            size += known[id(part)]
        elif isinstance(part, _CONTAINERS):
            waiting.extend(part)
            if isinstance(part, dict):
                waiting.extend(part.values())
        if parts + len(waiting) > MAX_PARTS:
            raise SecurityError(f"it makes a value of more than {MAX_PARTS} parts")
    _pay(PART_WORK * parts)
    return parts + size


def _checked(value: Any) -> Any:
    """Pay for a value that was just made, and give it back."""
    size = _size(value)
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it makes a text of {size} characters, the limit is {MAX_CHARACTERS}")
    _pay(size)
    return value


def _announced(characters: int) -> None:
    """Pay for a text before it is made."""
    if characters > MAX_CHARACTERS:
        raise SecurityError(f"it would make a text of {characters} characters, the limit is {MAX_CHARACTERS}")
    _pay(characters)


class SandboxedTemplates(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled in. Compile and render inside `budget()`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, globals: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> None:
        # Unoptimised: constants would be folded while compiling, where operators are not intercepted.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_checked,
            optimized=False,
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
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "*":
            _announced(_product(left, right))
        elif operator == "**":
            _check_power(left, right)
        elif operator == "+":
            _announced(_size(left) + _size(right))
        return _checked(super().call_binop(context, operator, left, right))

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
        _pay()
        if isinstance(obj, LoopContext):
            args = (self.bounded_items(args[0]), *args[1:])
        if getattr(obj, "__self__", None) is self:
            return obj(*args)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str | bytes):
            _pay(len(owner))
            if name == "replace" and len(args) >= 2:
                _announced(_replaced(owner, args[0], args[1]))
            elif name == "join" and args:
                args = (items := list(args[0]), *args[1:])
                _announced(_size(items) + len(owner) * len(items))
        return _checked(super().call(context, obj, *args, **kwargs))

    # ---- reached from compiled templates, by `_Bounded` ----

    def bounded_items(self, iterable: Iterable[Any]) -> list[Any]:
        """What a loop runs over, paid for in advance."""
        items = list(iterable)
        _pay(STEP_WORK * len(items))
        return items

    def bounded_concat(self, *values: Any) -> str:
        """The `~` operator."""
        _announced(sum(_size(value) for value in values))
        return "".join(map(str, values))

    def bounded_operand(self, value: Any) -> Any:
        """A side of a comparison, or what is sliced."""
        _pay(_size(value))
        return value

    def bounded_literal(self, value: Any) -> Any:
        """A list, tuple or mapping that a template spells out."""
        return _checked(value)

    def concat(self, parts: Iterable[str]) -> str:
        """How rendered pieces become a string: of the whole template, a macro, or a `set` block."""
        pieces = list(parts)
        _announced(sum(map(len, pieces)))
        return "".join(pieces)


def _check_format(template: str, values: Any) -> None:
    if _WIDE_FORMAT.search(template):
        raise SecurityError("it formats with a width or precision that is too large or not a constant")
    fields = template.count("{") + template.count("%")
    _announced(len(template) + fields * (1000 + _size(values)))


def _product(left: Any, right: Any) -> int:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
            return max(0, count) * max(1, _size(sequence))
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
        _pay(sum(_size(value) for value in given) + sum(_size(value) for value in kwargs.values()))
        options = [*given[1:], *kwargs.values()]
        if name in _COUNTED_FILTERS:
            for option in options:
                if _size(option) > MAX_COUNT or (isinstance(option, int) and option > MAX_COUNT):
                    raise SecurityError(f"it gives the filter {name!r} a count above {MAX_COUNT}")
        if name == "indent" and given:
            widths = [option if isinstance(option, int) else len(option) for option in options[:1]] or [4]
            _announced(len(str(given[0])) + (str(given[0]).count("\n") + 1) * widths[0])
        elif name == "replace" and len(given) >= 3:
            _announced(_replaced(str(given[0]), str(given[1]), str(given[2])))
        elif name == "join" and given:
            items = list(given[0])
            args = tuple(items if value is given[0] else value for value in args)
            separators = [str(option) for option in options]
            _announced(_size(items) + len(items) * max((len(text) for text in separators), default=0))
        elif name == "format":
            _check_format(str(given[0]), [given[1:], kwargs])
        return _checked(function(*args, **kwargs))

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
            node.node = _through("bounded_operand", node.node)
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
