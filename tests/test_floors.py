"""The floors of the dependencies have one owner, pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from tests.floors import PYPROJECT, TOOLS, floors


def test_every_dependency_has_a_floor_that_is_installed_as_it_stands() -> None:
    dependencies = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert [one.replace("==", ">=") for one in floors()] == dependencies and len(dependencies) >= 19
    done = subprocess.run(
        [sys.executable, PYPROJECT.parent / "tests" / "floors.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [*floors(), *TOOLS]


def test_one_floor_may_be_replaced_and_no_other_package_be_named() -> None:
    assert "torch==2.13.0" in floors(["torch==2.13.0"]) and len(floors(["torch==2.13.0"])) == len(floors())
    with pytest.raises(ValueError, match="no dependency"):
        floors(["tensorflow==2"])


def test_what_is_tested_is_no_older_than_the_floors() -> None:
    text = (PYPROJECT.parent / "constraints.txt").read_text(encoding="utf-8")
    pinned = {name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w-]+)==(\S+)$", text, re.M)}

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    for floor in floors():
        name, _, version = floor.partition("==")
        assert numbers(version) <= numbers(pinned[name.partition("[")[0].lower()]), floor
