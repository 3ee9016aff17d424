"""Moved to ``reducers.runtime``; this name stays for one version."""

import warnings
from typing import Any

from reducers import runtime as _moved

warnings.warn("reducers.vit is now reducers.runtime", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    return getattr(_moved, name)
