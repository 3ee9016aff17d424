"""The code of trials as it would be after an edit: sources changed in memory, the rest read once."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from ablations.trial import code as code_version
from ablations.trial.code_sources import Sources, taken_apart
from ablations.trial.stages import Stages, Training
from ablations.trial.trial import Trial

FIXED = Trial("s", "v", None, Stages('[{"at":[3],"stack":[{"name":"ats"}]}]'), "m", "file", "0", "w", "1", 10, 5, 0)
RECIPE = Training('{"epochs":1,"stages":[{"at":[3],"stack":[{"name":"dynamicvit"}]}]}')
WHOLE = dataclasses.replace(FIXED, target=0.5, training=RECIPE, measure="speed")


def using(*names: str) -> Trial:
    stages = Stages.of([{"at": [3], "stack": [{"name": name} for name in names]}])
    return dataclasses.replace(FIXED, stages=stages)


def sources_now() -> Sources:
    return code_version._sources()


def edited(file: str, *edits: tuple[str, str]) -> Sources:
    """The sources with one file edited, which must not change what names it gives."""
    now, name = sources_now(), file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    path = now.file(name)
    assert path is not None
    text = path.read_text()
    for old, new in edits:
        assert old in text, (file, old)
        text = text.replace(old, new, 1)
    return with_tree(name, ast.parse(text), package=path.name == "__init__.py")


def with_tree(name: str, tree: ast.Module, *, package: bool = False) -> Sources:
    """The sources with one module replaced; what is known of all others is kept."""
    now = sources_now()
    for part in code_version.ROOTS:  # all that is used has been read
        code_version._part(part, frozenset(), ())
    doors = (root for roots in code_version.ROOTS.values() for root in roots)
    new = Sources(now.folders, doors=doors, closed=code_version.CLOSED, methods=code_version.METHODS)
    new.modules = {**now.modules, name: taken_apart(tree, name, package=package)}
    new.definitions = {place: known for place, known in now.definitions.items() if place.module != name}
    return new


@contextmanager
def reading(sources: Sources) -> Iterator[None]:
    """Within, codes come from these sources."""
    now = code_version._sources
    forget()
    code_version._sources = lambda: sources  # type: ignore[assignment]
    try:
        yield
    finally:
        code_version._sources = now
        forget()


def forget() -> None:
    code_version._part.cache_clear()
    code_version._code.cache_clear()


def changed(sources: Sources, trial: Trial = WHOLE) -> list[str]:
    """The parts of the trial's code that these sources change."""
    before = code_version.code_of(trial)
    with reading(sources):
        return code_version.changed_parts(before, code_version.code_of(trial))


def users(sources: Sources) -> set[str]:
    """The methods whose trials these sources change; "" stands for a trial without any."""
    trials = {name: using(name) for name in sources_now().methods()} | {"": using()}
    before = {name: code_version.code_of(trial) for name, trial in trials.items()}
    with reading(sources):
        return {name for name, trial in trials.items() if code_version.code_of(trial) != before[name]}
