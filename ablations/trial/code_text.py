"""What a definition says to a digest: one text for all sources that compute the same statement by statement.

Beside ``code_version``, which decides what belongs to a trial. Standard library only, and no module is named here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class Place(NamedTuple):
    """A definition of the packages; the name "" is what the module does when it is imported."""

    module: str
    name: str


class Inside(NamedTuple):
    """A module of the packages."""

    module: str


class Outside(NamedTuple):
    """What another package holds, by its dotted name."""

    name: str


Meaning = Place | Inside | Outside
Find = Callable[[str], list[Meaning]]  # what a name at the top of the module stands for; none: a builtin, or unknown
Member = Callable[[str, str], list[Meaning]]  # what a module's attribute stands for


def told(statements: Iterable[Any]) -> Iterator[Any]:
    """Statements without those that only say something: docstrings, log lines, imports, what type checkers read."""
    for each in statements:
        if isinstance(each, ast.If) and last_name(each.test) == "TYPE_CHECKING":
            yield from told(each.orelse)
        elif not (isinstance(each, ast.Pass | ast.Import | ast.ImportFrom) or _only_says(each)):
            yield each


def _only_says(node: object) -> bool:
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return True
    called = node.value.func if isinstance(node.value, ast.Call) else None
    is_log = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
    return is_log and called.value.id in _LOGS and called.attr in _LEVELS  # type: ignore[union-attr]


_LOGS = frozenset({"log", "_log", "logger", "_logger", "logging"})
_LEVELS = frozenset({"debug", "info", "warning", "error", "exception", "critical", "log"})


def statements_in(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement inside these, those for type checkers left out."""
    for each in body:
        hidden = isinstance(each, ast.If) and last_name(each.test) == "TYPE_CHECKING"
        yield each
        if not hidden:
            yield from statements_in(getattr(each, "body", ()))
        for field in ("orelse", "finalbody", "handlers", "cases"):
            yield from statements_in(getattr(each, field, ()))


def imports_of(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(name it gives, "module" or "module:name") of an import."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            yield alias.asname or alias.name, f"{module}:{alias.name}"


def names_given(node: ast.AST) -> Iterator[str]:
    """Names that a statement binds where it stands, not inside functions, classes and comprehensions; no imports."""
    if isinstance(node, Comprehension):
        yield from (inner.target.id for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr))
        return
    given = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
    if isinstance(node, Defined | ast.MatchAs | ast.MatchStar | ast.ExceptHandler):
        given = node.name
    elif isinstance(node, ast.MatchMapping):
        given = node.rest
    if given:
        yield given
    if not isinstance(node, Defined | ast.Lambda | ast.Name):
        for inner in ast.iter_child_nodes(node):
            yield from names_given(inner)


def last_name(node: ast.AST | None) -> str:
    """The last name of a dotted one."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


# --- the text ---------------------------------------------------------------------------------------------------------

_EXACT_CALLS = frozenset(  # what they are given is looked for, or is an equation: never prose
    {
        "einsum", "rearrange", "reduce", "repeat", "split", "rsplit", "partition", "rpartition", "replace", "find",
        "index", "count", "startswith", "endswith", "strip", "removeprefix", "removesuffix", "get", "pop", "compile",
        "match", "search", "sub", "getattr", "setattr", "hasattr", "encode", "sha256",
    }
)  # fmt: skip
_EXACT_FIELDS = {ast.Dict: "keys", ast.Subscript: "slice", ast.MatchValue: "value", ast.MatchMapping: "keys"}
_SAID_BY_CLASSES = frozenset({"summary", "source", "trained_as"})  # what a method says of itself
_SAID_TO_SEARCHES = frozenset({"searchable", "budgets"})  # what of a method is tried; no trial asks
_UNWRITTEN = frozenset({"ctx", "kind", "type_comment", "type_params", "simple", "annotation", "returns"})
_WORD = re.compile(r"[^\W\d_]{2,}(?:['’\-/][^\W\d_]+)*")
_EDGES = "\"'`.,:;!?…()[]{}<>*"


def is_prose(text: str) -> bool:
    """At least two words of two letters or more, with a space between them."""
    return sum(_WORD.fullmatch(word.strip(_EDGES)) is not None for word in text.split()) >= 2


def canonical(tree: ast.AST) -> str:
    """The text of a tree whose names are not looked up."""
    writer = Writer(lambda name: [], lambda module, name: [])
    writer.write(tree)
    return "".join(writer.out)


class Writer:
    """Writes one definition down, and notes what of the packages it names."""

    def __init__(self, find: Find, member: Member) -> None:
        self.out: list[str] = []
        self.uses: dict[Place | Inside, None] = {}  # in the order of the text
        self.follows: dict[Place | Inside, None] = {}  # named by annotations only
        self._find, self._member = find, member
        self._local: list[frozenset[str]] = []  # names of the functions and comprehensions around
        self._exact = 0  # within what never is prose

    def write(self, value: object) -> None:
        """A node, a list of nodes, or a plain value."""
        if isinstance(value, ast.AST):
            special = getattr(self, f"_{type(value).__name__.lower()}", None)
            if special is None:
                self._node(value)
            else:
                special(value)
        elif isinstance(value, list):
            for item in told(value):
                self.write(item)
        else:
            self.out.append(f"{type(value).__name__}:{value!r};")

    def _node(self, node: ast.AST, *, without: frozenset[str] = frozenset()) -> None:
        exact = _EXACT_FIELDS.get(type(node))
        self.out.append(f"{type(node).__name__}(")
        for name, inner in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                self._annotation(inner)
            inner = list(told(inner)) if isinstance(inner, list) else inner
            if inner is None or inner == [] or name in _UNWRITTEN or name in without:
                continue
            self.out.append(f"{name}=")
            with self._looked_up(name == exact):
                self.write(inner)
        self.out.append(")")

    @contextmanager
    def _looked_up(self, exact: bool) -> Iterator[None]:
        self._exact += exact
        yield
        self._exact -= exact

    @contextmanager
    def _within(self, names: Iterable[str]) -> Iterator[None]:
        self._local.append(frozenset(names))
        yield
        self._local.pop()

    def _annotation(self, node: ast.AST | None) -> None:
        if node is not None:
            aside = Writer(self._find, self._member)
            aside.write(node)
            self.follows |= aside.uses

    # names

    def _meaning(self, node: ast.AST) -> list[Meaning]:
        """What a dotted name stands for, if it begins at the top of the module."""
        if isinstance(node, ast.Name):
            return [] if any(node.id in names for names in self._local) else self._find(node.id)
        if not isinstance(node, ast.Attribute):
            return []
        found: list[Meaning] = []
        for each in self._meaning(node.value):
            if isinstance(each, Outside):
                found.append(Outside(f"{each.name}.{node.attr}"))
            elif isinstance(each, Inside):
                found += self._member(each.module, node.attr)
        return found

    def _name(self, node: ast.Name) -> None:
        self._named(node, self._meaning(node), node.id)

    def _attribute(self, node: ast.Attribute) -> None:
        found = self._meaning(node)
        if found:
            self._named(node, found, node.attr)
        else:
            with self._looked_up(isinstance(node.value, ast.Constant)):
                self._node(node)

    def _named(self, node: ast.AST, found: list[Meaning], name: str) -> None:
        inner = [each for each in found if not isinstance(each, Outside)]
        self.uses |= dict.fromkeys(inner)
        names = {each.name for each in found if isinstance(each, Outside)}
        names |= {each.name for each in inner if isinstance(each, Place) and each.name}
        if any(isinstance(each, Inside) for each in found):
            names.add("a module")
        self.out.append(f"Name:{' '.join(sorted(names)) or name};")

    # scopes

    def _functiondef(self, node: Any) -> None:
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        parameters += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        body = node.body if isinstance(node.body, list) else [node.body]
        given = {name for statement in body for name in names_given(statement)}
        inside = list(statements_in(body)) if isinstance(node.body, list) else []
        given -= {name for each in inside if isinstance(each, ast.Global | ast.Nonlocal) for name in each.names}
        given -= {alias for each in inside for alias, _ in imports_of(each, "")}
        self.out.append(f"{type(node).__name__}:{getattr(node, 'name', '')}(")
        self.write(getattr(node, "decorator_list", []))
        self._annotation(getattr(node, "returns", None))
        self.write(arguments)  # defaults are made outside
        with self._within({each.arg for each in parameters} | given):
            self.write(node.body)
        self.out.append(")")

    _asyncfunctiondef = _lambda = _functiondef

    def _listcomp(self, node: Any) -> None:
        names = {name for each in node.generators for name in names_given(each.target)}
        self.write(node.generators[0].iter)
        with self._within(names):
            self._node(node)

    _setcomp = _dictcomp = _generatorexp = _listcomp

    def _classdef(self, node: ast.ClassDef) -> None:
        said = [each for each in node.body if _is_saying(each)]
        body = [each for each in node.body if each not in said]
        self._node(ast.ClassDef(node.name, node.bases, node.keywords, body, node.decorator_list))

    # what is only said

    def _constant(self, node: ast.Constant) -> None:
        text = node.value
        if not isinstance(text, str):
            self.write(text)
        elif not self._exact and is_prose(text):
            self.out.append("Said();")
        else:
            module = self._member(text, "") if "." in text else []  # a module that is imported by its name
            self.uses |= dict.fromkeys(each for each in module if isinstance(each, Inside))
            self.write("a module" if module else text)

    def _joinedstr(self, node: ast.JoinedStr) -> None:
        parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if self._exact or not is_prose("".join(map(str, parts))):
            self._node(node)
            return
        self.out.append("Said(")
        self.write([part.value for part in node.values if isinstance(part, ast.FormattedValue)])
        self.out.append(");")

    def _compare(self, node: ast.Compare) -> None:
        with self._looked_up(True):
            self._node(node)

    def _call(self, node: ast.Call) -> None:
        if Outside("warnings.warn") in self._meaning(node.func):
            self.out.append("Call(warnings.warn)")
            return
        with self._looked_up(last_name(node.func) in _EXACT_CALLS):
            self._node(node)

    def _raise(self, node: ast.Raise) -> None:
        self.out.append("Raise(")
        self.write(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        self.out.append(")")

    def _assert(self, node: ast.Assert) -> None:
        self._node(node, without=frozenset({"msg"}))


def _is_saying(node: ast.stmt) -> bool:
    """``summary = "…"`` or ``searchable = {…}`` in a class."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    value = getattr(node, "value", None)
    said = _SAID_TO_SEARCHES
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        said = said | _SAID_BY_CLASSES
    return value is not None and all(isinstance(each, ast.Name) and each.id in said for each in targets)
