"""A Python in which packages are not installed, as far as a program can tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]

_WITHOUT = """\
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {lacking!r} else self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run_without(packages: Iterable[str], program: str, *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a program there."""
    words = [sys.executable, "-c", _WITHOUT.format(lacking=sorted(packages)) + program]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)


def command_without(
    packages: Iterable[str], *words: str | Path, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """``sievit`` there, with these words."""
    given = list(map(str, words))
    program = f"from ablations.cli.main import main\nsys.exit(main({given!r}))\n"
    return run_without(packages, program, timeout=timeout)
