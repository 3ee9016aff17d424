"""What a newcomer meets first: make, the pinned versions, and the example of CONTRIBUTING."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import timm
import torch

from reducers import Count, at, available, reduce_tokens, registry

ROOT = Path(__file__).parent.parent
TARGETS = (
    "help",
    "ablations",
    "smoke",
    "test",
    "test-slow",
    "lint",
    "train",
    "docs",
    "bench",
    "weights",
    "report",
    "clean",
)

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> str:
    """What make prints, in an environment that sets none of its variables."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@needs_make
def test_make_alone_explains_every_target_and_variable() -> None:
    text = make()
    for target in TARGETS:
        assert re.search(rf"^  make {target} +\w", text, re.MULTILINE), target
    for variable in ("WORKLOAD", "DATA", "MODEL", "WEIGHTS", "OUT", "SPECS", "LIMIT", "BATCH", "WORKERS", "METHOD"):
        assert variable in text


@needs_make
def test_every_target_but_help_and_clean_sets_up_first(tmp_path: Path) -> None:
    for target in TARGETS:
        plan = make("--dry-run", target, f"VENV={tmp_path}")
        sets_up = "-m pip install" in plan
        assert sets_up == (target not in ("help", "clean")), target


@needs_make
def test_options_are_passed_on_only_when_they_are_set(tmp_path: Path) -> None:
    venv = f"VENV={tmp_path}"
    plain = make("--dry-run", "ablations", venv)
    assert "-m ablations run --out 'results/embedded'" in plain
    assert not re.search(r"--(workload|data|model|weights|specs|limit|batch|workers|labels|no-links)", plain)
    chosen = make("--dry-run", "ablations", venv, "WORKLOAD=torchvision:DTD", "DATA=my images", "LIMIT=5", "SPECS=a b")
    assert "--out 'results/torchvision-DTD'" in chosen
    for option in ("--workload 'torchvision:DTD'", "--data 'my images'", "--limit '5'", "--specs 'a b'"):
        assert option in chosen
    for target in ("ablations", "train"):
        folder = make("--dry-run", target, venv, "LABELS=my val.txt", "LINKS=no")
        assert "--labels 'my val.txt'" in folder and "--no-links" in folder
    assert "--no-links" not in make("--dry-run", "ablations", venv, "LINKS=yes")


@needs_make
def test_a_run_installs_what_runs_need_and_the_tests_what_they_need(tmp_path: Path) -> None:
    runs, tests = ("ablations", "recommend", "train"), ("test", "lint")
    for target, extra in [*((name, "video") for name in runs), *((name, "dev") for name in tests)]:
        plan = make("--dry-run", target, f"VENV={tmp_path}")
        assert re.findall(r"--editable '\.\[(\w+)\]'", plan) == [extra]
    (tmp_path / ".sievit-installed").touch()
    assert "--editable" not in make("--dry-run", "ablations", f"VENV={tmp_path}")
    assert "--editable '.[dev]'" in make("--dry-run", "test", f"VENV={tmp_path}")


@needs_make
def test_train_passes_on_the_methods_and_the_recipe(tmp_path: Path) -> None:
    plan = make("--dry-run", "train", f"VENV={tmp_path}", "METHOD=dynamicvit avit", "LIMIT=5", "SET=epochs=1 images=64")
    assert "-m ablations train dynamicvit avit --out 'results/embedded'" in plan
    assert "--limit '5'" in plan and "--set epochs=1 images=64" in plan


def fake_python(folder: Path, *, run: int, report: int) -> str:
    """A ``VENV`` that only notes what it is asked to run, and ends with the given statuses."""
    script = folder / "bin" / "python"
    script.parent.mkdir(parents=True)
    script.write_text(
        f'#!/bin/sh\necho "$3" >> \'{folder}/calls\'\ncase "$3" in run) exit {run};; report) exit {report};; esac\n'
    )
    script.chmod(0o755)
    (folder / ".sievit-installed").touch()
    return f"VENV={folder}"


@needs_make
@pytest.mark.parametrize(
    ("run", "report", "called", "succeeds"),
    [
        (0, 0, ["run", "report"], True),
        (1, 0, ["run", "report"], False),  # some trial failed: what there is gets drawn
        (2, 0, ["run"], False),  # bad input
        (130, 0, ["run"], False),  # interrupted
        (0, 1, ["run", "report"], False),
    ],
)
def test_the_report_follows_a_run_and_the_status_tells_of_both(
    tmp_path: Path, run: int, report: int, called: list[str], succeeds: bool
) -> None:
    venv = fake_python(tmp_path / "venv", run=run, report=report)
    command = ["make", "ablations", venv, f"OUT={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == succeeds
    assert (tmp_path / "venv" / "calls").read_text().split() == called


def test_the_constraints_pin_exact_versions_and_name_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
    assert not [line for line in lines if re.match("nvidia|cuda|triton|sievit", line)]


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dev"], *extras["export"], *extras["hf"]]
    asked = [line for line in asked if not line.startswith("sievit[")]  # dev takes the other extras along
    names = {re.split(r"[\[><=!~ ]", line)[0].lower().replace("_", "-") for line in asked}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names - pinned == set()


def test_continuous_integration_calls_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_the_reducer_of_the_contributing_guide_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # forgotten again after this test
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "@register" in block]
    space: dict[str, type] = {"__name__": "largest"}  # type: ignore[dict-item]
    exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), space)
    assert "largest" in available()
    model = timm.create_model("test_vit").eval()
    reduced = reduce_tokens(model, at([2], space["Largest"](Count(10)))).eval()
    with torch.inference_mode():
        _, trace = reduced.trace(torch.randn(2, 3, 160, 160))
    assert trace.tokens[:, -1].tolist() == [11, 11]
