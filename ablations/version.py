"""The version of this package, as it was installed. Standard library alone."""

from __future__ import annotations

import importlib.metadata


def own_version() -> str:
    """``0.1.0``, or ``not installed`` where the code runs from a folder that nobody installed."""
    try:
        return importlib.metadata.version("sievit")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
