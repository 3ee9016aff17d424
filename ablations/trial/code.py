"""Which code a trial's numbers depend on, as a digest that stands in its key.

A trial uses a part of the project: the evaluation, its task, the methods it places, and where it has them the
calibration, the training and the timing. Each part is what is reached from its roots, definition by definition: a
definition is a statement at the top of a module, and it uses what it names, wherever that is defined. What the reached
definitions say is put into one text each, and the digest is over the set of these texts. No text holds the name of a
module, a comment, a docstring, an annotation, a message, a log line or an import, so that rewording, moving, renaming
and splitting files leave results valid, and another constant, rule, default or decorator does not. A name is digested
as what it stands for: ``F.linear`` and ``linear`` are one, and importing ``ceil`` in place of ``floor`` under the same
name is a change.

An annotation is not digested, yet the classes it names are followed: objects that were made elsewhere come in as
arguments. What runs when a module is imported belongs to every definition of that module.

Prose is a string, or an f-string, of at least two words of two or more letters with a space between them; all prose is
one to a digest. What is looked up or compared never counts as prose: keys, subscripts, comparisons, patterns, equations
of einsum and its kind, and what methods of strings are given.

What it cannot see: names made while running (``getattr`` with a computed name; a dotted name of a module as a string is
seen), what a module does for others by being imported, a star import, prose that decides (a message compared through a
variable), versions of other packages (they stand in the row), and what a user's own method imports from outside its
file. A method of an object belongs to its class, and a class is one definition.

Standard library only: the sources are read as text, nothing is imported for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.trial.code_sources import Sources
from ablations.trial.given import given_of

if TYPE_CHECKING:
    from ablations.trial.stages import Stages, Training
    from ablations.trial.trial import Trial

# --- what a move of files changes: these tables, and nothing below them -----------------------------------------------

ROOTS: dict[str, tuple[str, ...]] = {
    "evaluation": ("ablations.measure.evaluate:run_group", "ablations.measure.evaluate:run_trial"),
    "calibration": ("ablations.measure.calibrate:solve",),
    "training": ("ablations.measure.finetune.cache:finetuned", "ablations.measure.finetune.cache:train_or_load"),
    "given": ("ablations.measure.finetune.given:finetuned",),
    "timing": ("ablations.measure.speed:measure_speed",),
}
"""The parts of ``code`` and where each begins. One part never reaches into another's roots."""

BESIDES: dict[str, tuple[str, ...]] = {
    "evaluation": (
        "ablations.trial.random:random_seed",
        "reducers.placement:placement_from",  # which a trial asks for its reducers
        "ablations.measure.context:dense_predictions",
        "ablations.measure.context:model_facts",
        "ablations.models.loading:open_model",
        "ablations.workloads.base:Workload",
    ),
    "timing": ("reducers.placement:placement_from",),
}
"""What makes numbers of a part and is called by others, or as an attribute. A module's name stands for all it defines,
and for all that is defined below it.
"""

UNDIGESTED = {
    "embedded": ("ablations.workloads.embedded:embedded_workload",),
    "embedded:v1": ("ablations.workloads.embedded:first_workload",),
    "moving_digits": ("ablations.workloads.embedded:moving_workload",),
}
"""By workload: what is drawn beside the pixels and labels that the data digest covers (masks, clutter)."""

TASKS = "ablations.tasks"  # here each task is a module, which is looked up by its name

CLOSED = frozenset(
    {
        *(f"ablations.records.{name}" for name in (
            "columns", "files", "locks", "names", "paired", "parquet", "schema", "sign_flips", "storage", "streams",
        )),
        "ablations.tasks:task_of", "ablations.tasks:tasks",
        "ablations.store", "ablations.run", "ablations.spec", "ablations.cli",
        "ablations.catalogue", "ablations.system", "ablations.streams", "ablations.words",
        "ablations.trial.trial", "ablations.trial.code", "ablations.trial.code_sources", "ablations.trial.code_text",
        "ablations.trial.staleness", "ablations.measure.probes", "ablations.measure.profile",
        "ablations.measure.chance", "ablations.measure.failures:in_words", "ablations.measure.context:versions",
        "ablations.measure.context:device_name", "ablations.workloads.account", "ablations.workloads.problems",
    }
)  # fmt: skip
"""Modules, what is below them, and definitions that name, keep and show what others compute: no digest enters them.
What they write into a row is versioned by ``trial.RESULT_VERSION``.
"""

PACKAGES = ("ablations", "reducers")
METHODS = "reducers.methods"  # here ``@register("name")`` is looked for
REGISTRY = "reducers.registry"  # which knows a user's own methods

# --- the digest of a trial --------------------------------------------------------------------------------------------


def code_of(trial: Trial) -> str:
    """The code a trial uses as it is now: ``evaluation=3f9c… calibration=0ab1…``, one part for each step it has."""
    calibrated = trial.target is not None or bool(trial.calibration)
    return _code(trial.stages, calibrated, trial.training, bool(trial.measure), trial.workload, trial.task)


def runtime_code(task: str) -> str:
    """The code that asks a model without reduction: every trial of the task depends on it."""
    return _part("evaluation", frozenset(), (f"{TASKS}.{task}",))


def is_task(name: str) -> bool:
    """Whether this version knows a task of that name."""
    return name.isidentifier() and _sources().file(f"{TASKS}.{name}") is not None


def training_code(stages: Stages) -> str:
    """The code that trains with these stages."""
    return _part("training", _names(stages), ())


def changed_parts(old: str, new: str) -> list[str]:
    """Names of the parts in which two codes differ, in order."""
    one, other = (dict(each.split("=", 1) for each in code.split(" ") if "=" in each) for code in (old, new))
    return [part for part in ROOTS if one.get(part) != other.get(part)]


def read_again() -> None:
    """Forget the sources: they are read once a process."""
    for cached in (_sources, _part, _code):
        cached.cache_clear()


@lru_cache(maxsize=65536)
def _code(stages: Stages, calibrated: bool, training: Training, timed: bool, workload: str, task: str) -> str:
    beside = (*UNDIGESTED.get(workload, ()), f"{TASKS}.{task}")
    parts = {"evaluation": _part("evaluation", _names(stages), beside)}
    if calibrated:
        parts["calibration"] = _part("calibration", frozenset(), ())
    if given_of(training):  # who trained them, and by which code, is not asked: the key names them by their content
        parts["given"] = _part("given", frozenset(), ())
    elif training:
        parts["training"] = _part("training", _names(training.stages), ())
    if timed:
        parts["timing"] = _part("timing", frozenset(), ())
    return " ".join(f"{name}={digest}" for name, digest in parts.items())


def _names(stages: Stages) -> frozenset[str]:
    """Registered methods anywhere in stages: those inside stacks and selections as well."""
    methods, found = _sources().methods().keys() | _registered().keys(), set()

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            name = value.get("name")
            if isinstance(name, str) and name in methods:
                found.add(name)
            for inner in value.values():
                walk(inner)
        elif isinstance(value, tuple):
            for inner in value:
                walk(inner)

    walk(stages.data)
    return frozenset(found)


def _registered() -> dict[str, type]:
    """What the registry of this process holds, if there is one: nothing is imported for it."""
    registry = sys.modules.get(REGISTRY)
    return {} if registry is None else registry.available()


@cache
def _part(part: str, methods: frozenset[str], beside: tuple[str, ...]) -> str:
    return _sources().digest([*ROOTS[part], *BESIDES.get(part, ()), *beside], methods, _registered())


@cache
def _sources() -> Sources:
    doors = (root for roots in ROOTS.values() for root in roots)
    return Sources(_folders(), doors=doors, closed=CLOSED, methods=METHODS)


def _folders() -> dict[str, Path]:
    """Each package by itself: what is shipped to a cluster's nodes is unpacked into a folder a package."""
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {name: Path(spec.origin).parent for name, spec in found.items() if spec is not None and spec.origin}


__all__ = ["changed_parts", "code_of", "is_task", "read_again", "runtime_code", "training_code"]
