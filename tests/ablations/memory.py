"""How much memory a process held."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def most_held() -> float:
    """Megabytes that this process held at most. What began it is not counted, where Linux says so: its ``ru_maxrss``
    starts at what that process held, and a test worker that has run for an hour holds gigabytes.
    """
    if STATUS.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text(encoding="ascii"))):
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
