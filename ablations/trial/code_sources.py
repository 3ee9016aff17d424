"""The sources of the packages, taken apart into definitions, and what each of these uses.

Beside ``code_version``, which says where a trial's parts begin and what is closed. Standard library only: files are
read as text, and nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ablations.trial.code_text import (
    Defined,
    Inside,
    Meaning,
    Outside,
    Place,
    Writer,
    canonical,
    imports_of,
    last_name,
    names_given,
    statements_in,
    told,
)

_DIGITS = 12
_DEPTH = 3  # how far a definition is told from one that reads alike by what it uses


class CodeError(RuntimeError):
    """The source that a key needs cannot be read."""


@dataclass(frozen=True)
class Module:
    """A source, taken apart at its top."""

    name: str
    bound: Mapping[str, list[ast.stmt]]  # what each name is made by
    imported: Mapping[str, list[str]]  # name -> "module" or "module:name", wherever in the file the import stands
    effects: list[ast.stmt]  # statements that do something else than give names


def taken_apart(tree: ast.Module, name: str, *, package: bool) -> Module:
    """A module's statements by the names they give."""
    bound: dict[str, list[ast.stmt]] = {}
    imported: dict[str, list[str]] = {}
    effects = []
    for statement in told(tree.body):
        names = dict.fromkeys(names_given(statement))
        for each in names:
            bound.setdefault(each, []).append(statement)
        if not _only_gives(statement) and not _is_main(statement):
            effects.append(statement)
    for inner in statements_in(tree.body):
        for alias, target in imports_of(inner, name if package else name.rpartition(".")[0]):
            imported.setdefault(alias, []).append(target)
    return Module(name, bound, imported, effects)


def _only_gives(node: ast.stmt) -> bool:
    """Nothing but names comes from a statement at the top of a module."""
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return not any(isinstance(inner, ast.Attribute | ast.Subscript) for each in targets for inner in ast.walk(each))
    if isinstance(node, ast.If | ast.Try):
        inner = [*node.body, *node.orelse]
        if isinstance(node, ast.Try):
            inner += [*node.finalbody, *(each for handler in node.handlers for each in handler.body)]
        return all(map(_only_gives, told(inner)))
    return isinstance(node, Defined) or type(node).__name__ == "TypeAlias"


def _is_main(node: ast.stmt) -> bool:
    """``if __name__ == "__main__"``: not run by who imports the module."""
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))


@dataclass(frozen=True)
class Definition:
    """What is kept of one definition."""

    text: str  # its digest
    uses: tuple[Place, ...]  # in the order of the text
    follows: tuple[Place, ...]  # further ones, which no text names: classes of annotations, the module's effects


class Sources:
    """The packages' sources: read when they are asked for, each once.

    ``doors``: definitions that no other one reaches; ``closed``: modules, with what is below them, and definitions
    (``module:name``) that no digest enters; ``methods``: the package below which methods are registered.
    """

    def __init__(
        self, folders: Mapping[str, Path], *, doors: Iterable[str], closed: Iterable[str], methods: str
    ) -> None:
        self.folders = folders
        self.modules: dict[str, Module] = {}
        self.definitions: dict[Place, Definition] = {}
        self._doors, self._shut, self._methods_in = frozenset(doors), frozenset(closed), methods
        self._files: dict[str, Path | None] = {}
        self._reached: dict[Place, frozenset[Place]] = {}
        self._known: dict[tuple[Place, int], str] = {}
        self._methods: dict[str, Place] | None = None

    def digest(self, roots: Iterable[str], methods: Iterable[str], registered: Mapping[str, type]) -> str:
        """Of everything that is reached from these roots and methods."""
        starts, own = [place for root in roots for place in self.places(root)], []
        for name in sorted(methods):
            place = self.methods().get(name) or self._users(registered[name])
            if place is None:
                own.append(_digest(_class_source(registered[name])))
            else:
                starts.append(place)
        reached = frozenset(place for start in starts for place in self.reached(start))
        return _digest("\n".join([*sorted({self.known(place) for place in reached}), *sorted(own)]))

    def reached(self, start: Place) -> frozenset[Place]:
        """The definitions that one uses, itself included, as far as they make numbers."""
        if start not in self._reached:
            found, waiting = {start}, [start]
            while waiting:
                definition = self.definition(waiting.pop())
                new = {each for each in (*definition.uses, *definition.follows) if each not in found}
                found |= new
                waiting += new
            self._reached[start] = frozenset(found)
        return self._reached[start]

    def known(self, place: Place, depth: int = _DEPTH) -> str:
        """A digest of a definition and, so that namesakes are not confused, of what it uses."""
        key = place, depth
        if key not in self._known:
            definition = self.definition(place)
            parts = [self.known(each, depth - 1) for each in definition.uses] if depth else []
            self._known[key] = _digest(" ".join([definition.text, *parts]))
        return self._known[key]

    def is_open(self, place: Place) -> bool:
        """Whether digests enter a definition from elsewhere."""
        module = place.module.split(".")
        above = {".".join(module[:length]) for length in range(1, len(module) + 1)}
        name = f"{place.module}:{place.name}"
        return name not in self._doors and name not in self._shut and not above & self._shut

    def places(self, root: str) -> list[Place]:
        """The definitions that ``module:name`` names, or all of a module and of those below it."""
        module, _, name = root.partition(":")
        if name and name not in self.module(module).bound:
            raise CodeError(f"{module} defines no {name}, which is where keys of trials begin: correct the table")
        if name:
            return [Place(module, name)]
        return [place for each in self._below(module) for place in self._all(each) if self.is_open(place)]

    def methods(self) -> dict[str, Place]:
        """Name -> class of the methods that are shipped, found by their ``@register("name")``."""
        if self._methods is None:
            self._methods = {}
            for module in self._below(self._methods_in):
                for name, statements in self.module(module).bound.items():
                    for each in getattr(statements[-1], "decorator_list", ()):
                        if isinstance(each, ast.Call) and last_name(each.func) == "register" and each.args:
                            self._methods[str(getattr(each.args[0], "value", ""))] = Place(module, name)
        return self._methods

    def definition(self, place: Place) -> Definition:
        """The digest of a definition's text and what it uses, as far as that makes numbers."""
        if place not in self.definitions:
            writer, module = self._written(place), self.module(place.module)
            follows = [inner for each in self._expanded(writer.follows) for inner in self._classes(each, frozenset())]
            if place.name and module.effects and module.name.split(".")[0] in self.folders:
                follows.append(Place(module.name, ""))
            self.definitions[place] = Definition(
                _digest("".join(writer.out)),
                tuple(each for each in self._expanded(writer.uses) if self.is_open(each)),
                tuple(each for each in dict.fromkeys(follows) if self.is_open(each)),
            )
        return self.definitions[place]

    def text(self, place: Place) -> str:
        """What a definition says."""
        return "".join(self._written(place).out)

    def _written(self, place: Place) -> Writer:
        module = self.module(place.module)
        writer = Writer(lambda name: self.find(module.name, name), self.member)
        writer.write(module.bound[place.name] if place.name else module.effects)
        return writer

    def _expanded(self, named: Iterable[Place | Inside]) -> list[Place]:
        every = ([each] if isinstance(each, Place) else self._all(each.module) for each in named)
        return list(dict.fromkeys(place for places in every for place in places))

    def _classes(self, place: Place, seen: frozenset[Place]) -> list[Place]:
        """The classes that an annotation means, through other names for them."""
        made = self.module(place.module).bound.get(place.name, [None])[-1]
        if isinstance(made, ast.ClassDef):
            return [place]
        if place in seen or isinstance(made, ast.FunctionDef | ast.AsyncFunctionDef) or made is None:
            return []
        writer = Writer(lambda name: self.find(place.module, name), self.member)
        writer.write(made)
        return [inner for each in self._expanded(writer.uses) for inner in self._classes(each, seen | {place})]

    def find(self, module: str, name: str, seen: frozenset[Place] = frozenset()) -> list[Meaning]:
        """What a name of a module stands for; nothing where it is a builtin."""
        here = Place(module, name)
        if here in seen:
            return []
        source = self.module(module)
        found: list[Meaning] = [here] if name in source.bound else []
        for target in source.imported.get(name, ()):
            origin, _, inner = target.partition(":")
            if self.file(origin) is None:
                found.append(Outside(target.replace(":", ".")))
            elif inner:
                found += self.member(origin, inner, seen | {here})
            else:
                found.append(Inside(origin))
        return found

    def member(self, module: str, name: str, seen: frozenset[Place] = frozenset()) -> list[Meaning]:
        """What a module's attribute stands for; the whole module where that cannot be told. "": the module itself."""
        if not name:
            return [Inside(module)] if self.file(module) is not None else []
        found = self.find(module, name, seen)
        if found:
            return found
        if self.file(f"{module}.{name}") is not None:
            return [Inside(f"{module}.{name}")]
        return [Inside(module), Outside(name)]

    def module(self, name: str) -> Module:
        """A module of the packages, taken apart."""
        if name not in self.modules:
            file = self.file(name)
            if file is None:
                raise CodeError(
                    f"the source of {name} is not below {self.folders.get(name.split('.')[0])}, and keys of trials "
                    "need it; install from source"
                )
            tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
            self.modules[name] = taken_apart(tree, name, package=file.name == "__init__.py")
        return self.modules[name]

    def file(self, name: str) -> Path | None:
        """The source of a module of the packages, found without importing it."""
        if name not in self._files:
            package, *inner = name.split(".")
            path = self.folders[package].joinpath(*inner) if package in self.folders else None
            tried = () if path is None else (path / "__init__.py", path.with_name(f"{path.name}.py"))
            self._files[name] = next((file for file in tried if file.is_file()), None)
        return self._files[name]

    def _all(self, module: str) -> list[Place]:
        return [Place(module, name) for name in (*self.module(module).bound, "")]

    def _below(self, name: str) -> list[str]:
        """A module and every module in its folder, by name."""
        self.module(name)
        file = self.file(name)
        if file is None or file.name != "__init__.py":
            return [name]
        inner = (path.relative_to(file.parent).with_suffix("").parts for path in sorted(file.parent.rglob("*.py")))
        dotted = (".".join((name, *parts)).removesuffix(".__init__") for parts in inner)
        return list(dict.fromkeys((name, *dotted)))

    def _users(self, cls: type) -> Place | None:
        """The class of a method that a user registered, its file taken as a module."""
        with suppress(OSError, TypeError, SyntaxError):
            if cls.__module__.split(".")[0] not in self.folders:
                self._files[cls.__module__] = Path(inspect.getsourcefile(cls) or "")
            if cls.__qualname__ in self.module(cls.__module__).bound:
                return Place(cls.__module__, cls.__qualname__)
        return None


def _class_source(cls: type) -> str:
    try:
        return canonical(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    except (OSError, TypeError, SyntaxError):  # made on the fly: its name is all there is
        return f"{cls.__module__}.{cls.__qualname__}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
