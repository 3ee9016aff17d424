"""Moved to ``reducers.runtime.export``; this name stays for one version."""

import warnings
from typing import Any

from reducers.runtime import export as _moved

warnings.warn("reducers.export is now reducers.runtime.export", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    return getattr(_moved, name)
