"""The old place of what is now in ``reducers.decision`` and ``reducers.reducer``."""

import warnings
from typing import Any

from reducers import decision, reducer

warnings.warn("reducers.base is now reducers.decision and reducers.reducer", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    return getattr(decision if hasattr(decision, name) else reducer, name)
