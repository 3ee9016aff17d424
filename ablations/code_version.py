"""Which code a trial's numbers depend on, as a digest that stands in its key.

A trial uses a part of the project: the runtime, the methods it places and what these import, the evaluation, and where
it has them the calibration, the training and the timing. Each of these is found by following imports from its root, and
digested as a syntax tree without comments, docstrings, layout, annotations of arguments and wording of errors and logs:
a better sentence leaves results valid, another constant does not. A change in one method leaves those of all others
valid.

Standard library and the registry only: the sources are read as text, nothing is imported for it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reducers
from reducers import available

if TYPE_CHECKING:
    from ablations.trial import Trial

ROOTS = {
    "evaluation": ("ablations.evaluate",),
    "calibration": ("ablations.calibrate",),
    "training": ("ablations.finetune",),
    "timing": ("ablations.speed",),
}
"""The parts of ``code`` and where each begins. One part never reaches into another's roots."""

DESCRIBING = frozenset(
    f"ablations.{name}"
    for name in (
        "trial", "labels", "profile", "files", "progress", "probes", "store", "storage", "index", "record", "jobs",
        "trial_log", "code_version", "system", "pace",
    )
)  # fmt: skip
"""Modules that name, keep and show what others compute: no number comes from them, so no digest enters them. What they
write into a row is versioned by ``trial.RESULT_VERSION``.
"""

# each package by itself: what is shipped to a cluster's nodes is unpacked into a folder a package
_PACKAGES = {"ablations": Path(__file__).resolve().parent, "reducers": Path(reducers.__file__).resolve().parent}
_METHODS = "reducers.methods"  # the package imports every method; a trial depends on those that it places
_DIGITS = 12


class CodeError(RuntimeError):
    """The source that a key needs cannot be read."""


def code_of(trial: Trial) -> str:
    """The code a trial uses as it is now: ``evaluation=3f9c… calibration=0ab1…``, one part for each step it has."""
    return _code(trial.stages, trial.target is not None or bool(trial.calibration), trial.training, bool(trial.measure))


def runtime_code() -> str:
    """The code that evaluates a model without reduction: every trial depends on it."""
    return _part("evaluation", frozenset())


def training_code(stages: str) -> str:
    """The code that trains with these stages (JSON)."""
    return _part("training", _names(stages))


def changed_parts(old: str, new: str) -> list[str]:
    """Names of the parts in which two codes differ, in order."""
    one, other = (dict(each.split("=", 1) for each in code.split(" ") if "=" in each) for code in (old, new))
    return [part for part in ROOTS if one.get(part) != other.get(part)]


@lru_cache(maxsize=65536)
def _code(stages: str, calibrated: bool, training: str, timed: bool) -> str:
    names = _names(stages)
    parts = {"evaluation": _part("evaluation", names)}
    if calibrated:
        parts["calibration"] = _part("calibration", frozenset())
    if training:
        parts["training"] = _part("training", _names(training))
    if timed:
        parts["timing"] = _part("timing", frozenset())
    return " ".join(f"{name}={digest}" for name, digest in parts.items())


def _names(stages: str) -> frozenset[str]:
    """Registered methods anywhere in stages or a recipe: those inside stacks and selections as well."""
    methods, found = available(), set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("name") in methods:
                found.add(value["name"])
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(json.loads(stages or "[]"))
    return frozenset(found)


@cache
def _part(part: str, methods: frozenset[str]) -> str:
    stop = {root for other, roots in ROOTS.items() if other != part for root in roots}
    roots, own = list(ROOTS[part]), []
    for cls in (available()[name] for name in sorted(methods)):
        if cls.__module__.split(".")[0] in _PACKAGES and _file(cls.__module__) is not None:
            roots.append(cls.__module__)
        else:  # a method of the user's, registered from somewhere else
            own.append(f"{cls.__qualname__} {_digest(_class_source(cls))}")
    modules = [f"{name} {_module_digest(name)}" for name in sorted(closure(roots, stop=stop))]
    return _digest("\n".join([*modules, *own]))


def closure(roots: Iterable[str], *, stop: Iterable[str] = ()) -> set[str]:
    """Modules of the project that these import, themselves included, wherever the import stands."""
    closed = {*stop, *DESCRIBING, _METHODS}
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in closed:
            found.add(name)
            waiting += _imports(name)
    return found


@cache
def _imports(name: str) -> tuple[str, ...]:
    """Modules of the project that a module imports, those for type checkers left out."""
    found: dict[str, None] = {}
    for node in _walk(_tree(name)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [each for each in inner if _is_ours(each)]
            named = modules if len(modules) == len(inner) else [node.module, *modules]
        else:
            continue
        found.update(dict.fromkeys(each for each in named if _is_ours(each)))
    return tuple(found)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in _PACKAGES and _file(name) is not None


@cache
def _file(name: str) -> Path | None:
    """The source of a module of the project, found without importing it."""
    package, *inner = name.split(".")
    path = _PACKAGES[package].joinpath(*inner)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _tree(name: str) -> ast.Module:
    file = _file(name)
    if file is None:
        raise CodeError(
            f"the source of {name} is not below {_PACKAGES[name.split('.')[0]]}, and keys of trials need it; install "
            "from source"
        )
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _class_source(cls: type) -> str:
    try:
        return canonical(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    except (OSError, TypeError, SyntaxError):  # made on the fly: its name is all there is
        return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _module_digest(name: str) -> str:
    return _digest(canonical(_tree(name)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


# --- syntax trees -----------------------------------------------------------------------------------------------------


def canonical(tree: ast.AST) -> str:
    """One text for all sources that compute the same line by line; alike in every supported version of Python."""
    return "".join(_canonical(tree))


def _canonical(value: object) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            if not _says_only(item):
                yield from _canonical(item)
    elif isinstance(value, ast.Raise):
        raised = value.exc.func if isinstance(value.exc, ast.Call) else value.exc
        yield f"Raise({'' if raised is None else ast.unparse(raised)})"
    elif isinstance(value, ast.AST):
        skipped = _SKIPPED.get(type(value), ())
        yield f"{type(value).__name__}("
        for name, inner in ast.iter_fields(value):
            if inner is None or inner == [] or name in ("ctx", "kind", "type_comment") or name in skipped:
                continue
            yield f"{name}="
            yield from _canonical(inner)
            yield ","
        yield ")"
    else:
        yield f"{type(value).__name__}:{value!r};"


_SKIPPED: dict[type, tuple[str, ...]] = {
    ast.arg: ("annotation",),
    ast.FunctionDef: ("returns",),
    ast.AsyncFunctionDef: ("returns",),
}


def _says_only(node: object) -> bool:
    """Statements without effect on a number: docstrings, logging, imports for type checkers."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return True
    called = node.value.func if isinstance(node.value, ast.Call) else None
    return isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "log"


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """``ast.walk`` past what only says something."""
    for child in ast.iter_child_nodes(node):
        if not _says_only(child):
            yield child
            yield from _walk(child)
