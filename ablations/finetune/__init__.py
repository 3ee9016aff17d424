"""The old place of ``ablations.measure.finetune``, kept for who has it in files and fingers."""

import warnings
from typing import Any

from ablations.measure import finetune as _moved

warnings.warn("ablations.finetune is now ablations.measure.finetune", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    return getattr(_moved, name)
