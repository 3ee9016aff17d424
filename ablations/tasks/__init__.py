"""Tasks: what is asked of a model. Each is a file of this room, named like the task, that ends in its ``TASK``."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module

from ablations.tasks.base import Task

__all__ = ["Task", "TaskError", "task_of", "tasks"]

_SHARED = ("base",)


class TaskError(ValueError):
    """There is no such task."""


def tasks() -> dict[str, Task]:
    """Every task, by name."""
    return {each.name: task_of(each.name) for each in pkgutil.iter_modules(__path__) if each.name not in _SHARED}


def task_of(name: str) -> Task:
    """The task of a name.

    Raises:
        TaskError: there is none; the message names those that there are.
    """
    names = sorted(each.name for each in pkgutil.iter_modules(__path__) if each.name not in _SHARED)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise TaskError(f"unknown task {name!r}: {hint}choose {' or '.join(names)}")
    found: Task = import_module(f"{__name__}.{name}").TASK
    return found
