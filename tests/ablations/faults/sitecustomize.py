"""Read by every Python that starts with this folder on its path: faults for runs under test, chosen by environment.

``SIEVIT_TEST_CLOCK``: seconds that this process's clock is wrong by; ``jumps`` is a clock that a day is put forward or
back each time someone looks. The reducer of ``faulty`` is registered as soon as the project is imported.
"""

from __future__ import annotations

import os
import sys
import time


class _RegisterFaulty:
    """Imports the failing reducer just before anything of the experiments is; finds no module itself."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "ablations.measure.context":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            import faulty  # noqa: F401


sys.meta_path.insert(0, _RegisterFaulty())  # type: ignore[arg-type]

_clock = os.environ.get("SIEVIT_TEST_CLOCK")
if _clock == "jumps":
    _true, _looks = time.time, [0]

    def _jumping() -> float:
        _looks[0] += 1
        return _true() + (86400 if _looks[0] % 2 else -86400)

    time.time = _jumping
elif _clock:
    _right, _error = time.time, float(_clock)
    time.time = lambda: _right() + _error
