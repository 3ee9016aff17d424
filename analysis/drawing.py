"""matplotlib as it ships. Figures are drawn without a window and under matplotlib's own settings, whatever this
machine's user set up for theirs; and theirs, the backend among them, stay as they are.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

# What a figure in a file never asks, and what would choose or load somebody's backend.
NOT_OURS = ("backend", "backend_fallback", "interactive", "toolbar")


def bring_in() -> None:
    """Import matplotlib although the environment asks for a backend that this Python lacks (a notebook leaves its own
    in MPLBACKEND, for every command it starts), or for settings that are no text.
    """
    if "matplotlib" in sys.modules:
        return
    try:
        _import_for(os.environ.get("MPLBACKEND"))
    except UnicodeDecodeError:  # of a file of settings
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        with _environment(MATPLOTLIBRC=os.devnull):
            _import_for(os.environ.get("MPLBACKEND"))


def _import_for(backend: str | None) -> None:
    """Import matplotlib; then ask for the user's backend as matplotlib itself does, if there is such a one."""
    with _environment(MPLBACKEND=None):
        mpl = importlib.import_module("matplotlib")
    if backend:
        with suppress(ValueError):
            mpl.rcParams["backend"] = backend


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Environment variables set, or None to take them away, for a while."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def settings(own: Mapping[str, Any]) -> Iterator[None]:
    """matplotlib's defaults and ``own`` over them; before and after, whatever the user has."""
    mpl: Any = importlib.import_module("matplotlib")
    with mpl.rc_context():
        with warnings.catch_warnings():  # of defaults whose names are about to change
            warnings.simplefilter("ignore", mpl.MatplotlibDeprecationWarning)
            mpl.rcParams.update({k: v for k, v in mpl.rcParamsDefault.items() if k not in NOT_OURS})
        mpl.rcParams.update(own)
        yield
