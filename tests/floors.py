"""The oldest versions that pyproject.toml allows: ``make test-floors`` runs a part of the tests with them.

python tests/floors.py                     every dependency at its floor, a line each
python tests/floors.py torch==2.13.0       the same with another version of that one
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
"""What the tests need beside the dependencies, as new as pip finds it."""


def floors(instead: Sequence[str] = ()) -> list[str]:
    """``name==version`` for each dependency; ``instead`` replaces those of the same name."""
    dependencies = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = {}
    for dependency in dependencies:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)((?:\[[a-z,]+\])?)>=([0-9][0-9a-z.]*)", dependency)
        if match is None:
            raise ValueError(f"pyproject.toml: {dependency!r} has no floor; write NAME>=VERSION")
        found[match[1]] = f"{match[1]}{match[2]}=={match[3]}"
    for one in instead:
        name = one.partition("==")[0]
        if name not in found:
            raise ValueError(f"{one!r} is no dependency of pyproject.toml; there are {', '.join(found)}")
        found[name] = one
    return list(found.values())


if __name__ == "__main__":
    sys.stdout.write("\n".join([*floors(sys.argv[1:]), *TOOLS]) + "\n")
