"""Code versions: what a trial uses is digested, and nothing else."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ablations import code_version
from ablations.code_version import (
    CodeError,
    canonical,
    changed_parts,
    closure,
    code_of,
    runtime_code,
    training_code,
)
from ablations.plan import Target, expand
from ablations.spec import parse_spec
from ablations.trial import Trial
from reducers import registry as known_reducers
from tests.ablations.runs import ROOT, SPEC

FIXED = Trial("s", "v", None, '[{"at":[3],"stack":[{"name":"ats"}]}]', "m", "file", "0", "w", "1", 10, 5, 0)
RECIPE = '{"epochs":1,"stages":[{"at":[3],"stack":[{"name":"dynamicvit"}]}]}'


def using(*names: str) -> Trial:
    stack = ",".join(f'{{"name":"{name}"}}' for name in names)
    return dataclasses.replace(FIXED, stages=f'[{{"at":[3],"stack":[{stack}]}}]')


def read_again() -> None:
    """Sources are read once a process; a test that changes one has them read again."""
    for cached in (code_version._part, code_version._code, code_version._tree, code_version._module_digest,
                   code_version._imports, code_version._file):  # fmt: skip
        cached.cache_clear()


@pytest.fixture
def forget() -> Iterator[None]:
    read_again()
    yield
    read_again()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> Path:
    """A copy of the sources that may be changed."""
    for file in [*(ROOT / "reducers").rglob("*.py"), *(ROOT / "ablations").rglob("*.py")]:
        copied = tmp_path / file.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    monkeypatch.setattr(code_version, "_PACKAGES", {name: tmp_path / name for name in code_version._PACKAGES})
    return tmp_path


def changed(project: Path, file: str, old: str, new: str, trial: Trial) -> list[str]:
    """The parts of the trial's code that change with this edit."""
    before, path = code_of(trial), project / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    read_again()
    after = code_of(trial)
    path.write_text(text)
    read_again()
    return changed_parts(before, after)


ATS = "reducers/methods/ats.py"


def test_a_trial_names_the_steps_it_has() -> None:
    parts = lambda trial: [part.partition("=")[0] for part in code_of(trial).split(" ")]  # noqa: E731
    assert parts(FIXED) == ["evaluation"]
    assert parts(dataclasses.replace(FIXED, target=0.5)) == ["evaluation", "calibration"]
    assert parts(dataclasses.replace(FIXED, training=RECIPE, measure="speed")) == ["evaluation", "training", "timing"]


def test_every_planned_trial_carries_its_code(target: Target) -> None:
    trials = expand(parse_spec(SPEC), target)
    assert all(trial.code == code_of(trial) for trial in trials)
    assert len({trial.code for trial in trials}) == 2, "one for each of the two methods"


def test_a_constant_in_a_method_changes_the_trials_that_use_it_and_no_others(project: Path) -> None:
    edit = (project, ATS, "import torch\n", "import torch\n\n_SLIP = 3\n")
    assert changed(*edit, FIXED) == ["evaluation"]
    assert changed(*edit, using("topk", "ats")) == ["evaluation"]
    assert changed(*edit, using("tome")) == []
    selected = dataclasses.replace(
        FIXED, stages=FIXED.stages.replace('{"name":"ats"}', '{"name":"evit","select":{"name":"ats"}}')
    )
    assert changed(*edit, selected) == ["evaluation"]


def test_what_methods_import_belongs_to_them(project: Path) -> None:
    edit = (project, "reducers/methods/topk.py", "import torch\n", "import torch\n\n_SLIP = 3\n")
    assert "from reducers.methods.topk import" in (project / "reducers/methods/evit.py").read_text()
    assert changed(*edit, using("evit")) == ["evaluation"]


def test_words_change_nothing(project: Path) -> None:
    text = (project / ATS).read_text()
    first_line = text.splitlines()[0]
    assert changed(project, ATS, first_line, '"""Other words."""\n\n# and a remark' if first_line.endswith('"""') else
                   first_line + " Other words.", FIXED) == []  # fmt: skip
    log = "log = logging.getLogger(__name__)\n"
    assert changed(project, "ablations/evaluate.py", log, log + '\nlog.info("hello")\n', FIXED) == []


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("ablations/evaluate.py", ["evaluation"]),
        ("ablations/metrics.py", ["evaluation"]),
        ("ablations/workloads/base.py", ["evaluation", "training"]),
        ("reducers/vit/attention.py", ["evaluation", "calibration", "training", "timing"]),
        ("reducers/budget.py", ["evaluation", "calibration", "training", "timing"]),
        ("ablations/calibrate.py", ["calibration"]),
        ("ablations/auto.py", ["calibration", "training"]),
        ("ablations/finetune/loop.py", ["training"]),
        ("ablations/finetune/schedule.py", ["training"]),
        ("reducers/methods/dynamicvit.py", ["training"]),
        ("ablations/speed.py", ["timing"]),
        ("ablations/progress.py", []),
        ("ablations/store.py", []),
        ("ablations/options.py", []),
        ("reducers/export.py", []),
    ],
)
def test_each_file_belongs_to_the_steps_that_run_it(file: str, parts: list[str], project: Path) -> None:
    whole = dataclasses.replace(FIXED, target=0.5, training=RECIPE, measure="speed")
    marker = "from __future__ import annotations\n"
    found = changed(project, file, marker, marker + "\n_SLIP = 3\n", whole)
    assert set(parts) <= set(found)
    if parts in ([], ["calibration"], ["timing"]) or file.startswith(("ablations/finetune", "reducers/methods")):
        assert found == parts


def test_everything_a_trial_imports_is_covered_or_only_describes() -> None:
    """Run for real: what an evaluation loads of the project must be in its code, or on the short list of what only
    names and keeps.
    """
    code = (
        "import sys, ablations.evaluate\n"
        "print('\\n'.join(n for n in sys.modules if n.split('.')[0] in ('reducers', 'ablations')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    covered = closure(["ablations.evaluate"], stop=["ablations.calibrate", "ablations.finetune", "ablations.speed"])
    packages = {"reducers", "ablations", "ablations.workloads", "reducers.vit", "reducers.methods"}
    rest = {name for name in loaded - covered - packages - code_version.DESCRIBING if "reducers.methods." not in name}
    workloads = {name for name in rest if name.startswith("ablations.workloads.")}  # their result is in the data digest
    assert rest - workloads == {"ablations.auto"}, "it reads budgets for labels; calibration has it"


def test_annotations_messages_and_layout_are_no_code() -> None:
    one = 'def f(x: int) -> int:\n    """Says."""\n    if x:\n        raise ValueError("no")\n    return (x + 1)\n'
    other = 'def f(x):\n    # remark\n    if x: raise ValueError(f"not {x}, but …")\n    return x + 1\n'
    assert canonical(ast.parse(one)) == canonical(ast.parse(other))
    for different in ("x + 2", "x - 1", "-x"):
        assert canonical(ast.parse(one.replace("(x + 1)", different))) != canonical(ast.parse(one))
    assert canonical(ast.parse(one.replace("ValueError", "KeyError"))) != canonical(ast.parse(one))


def test_parts_are_told_apart() -> None:
    assert changed_parts("evaluation=a timing=b", "evaluation=a timing=c") == ["timing"]
    assert changed_parts("evaluation=a", "evaluation=a training=t") == ["training"]
    assert runtime_code() == runtime_code() != training_code("[]")


def test_a_users_own_method_is_digested_by_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    codes = []
    for body in ("uses_random = False", "uses_random = True"):
        file = tmp_path / f"own_{len(codes)}.py"
        file.write_text(f"from reducers import TokenReducer\n\n\nclass Own(TokenReducer):\n    {body}\n")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(known_reducers._METHODS, "own", module.Own)
        read_again()
        codes.append(code_of(using("own")))
    assert codes[0] != codes[1]


def test_packages_in_folders_of_their_own_have_the_same_code(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray unpacks what is shipped to a cluster's nodes."""
    together = code_of(using("ats"))
    apart = tmp_path / "apart" / "reducers"
    apart.parent.mkdir()
    (project / "reducers").rename(apart)
    monkeypatch.setattr(code_version, "_PACKAGES", {"ablations": project / "ablations", "reducers": apart})
    read_again()
    assert code_of(using("ats")) == together


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    monkeypatch.setattr(code_version, "_PACKAGES", {name: tmp_path / name for name in code_version._PACKAGES})
    with pytest.raises(CodeError, match=r"source of ablations.evaluate .* install from source"):
        code_of(FIXED)
