"""The cores a process may use, which operating systems tell each in its own way. No other module asks."""

from __future__ import annotations

import os


def cores() -> int:
    """How many cores this process may use: all of the machine's where the system cannot tell (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
