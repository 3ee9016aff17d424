"""Code versions: what makes a trial's numbers is digested, and nothing else."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.tasks import tasks
from ablations.trial import code as code_version
from ablations.trial.code import changed_parts, code_of, read_again, runtime_code, training_code
from ablations.trial.code_sources import CodeError, Sources
from ablations.trial.code_text import Place
from ablations.trial.stages import DENSE, Stages
from ablations.trial.target import Target
from reducers import available
from reducers import registry as known_reducers
from tests.ablations.code_edits import (
    FIXED,
    RECIPE,
    WHOLE,
    changed,
    edited,
    forget,
    reading,
    sources_now,
    users,
    using,
    with_tree,
)  # fmt: skip
from tests.ablations.runs import ROOT, SPEC
from tests.samples import sampled

EVALUATE = "ablations/measure/evaluate.py"
FAILURES = "ablations/measure/failures.py"
CALIBRATE = "ablations/measure/calibrate.py"
PROGRESS = "ablations/run/progress.py"

EVERY = frozenset({*available(), ""})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources that may be changed."""
    for file in [*(ROOT / "reducers").rglob("*.py"), *(ROOT / "ablations").rglob("*.py")]:
        copied = tmp_path / file.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    unchanged()
    monkeypatch.setattr(code_version, "_folders", lambda: {name: tmp_path / name for name in code_version.PACKAGES})
    read_again()
    yield tmp_path
    monkeypatch.undo()
    read_again()


def codes() -> list[str]:
    """Of trials that use all there is."""
    every = dataclasses.replace(WHOLE, stages=using(*sources_now().methods()).stages)
    return [code_of(every), code_of(dataclasses.replace(using("dpc_knn", "gtp"), workload="embedded"))]


@cache
def unchanged() -> str:
    """As ``evaluated``, of the tree itself."""
    return evaluated()


def evaluated() -> str:
    """Of a trial that is only evaluated."""
    return code_of(dataclasses.replace(using("dpc_knn", "gtp"), workload="embedded"))


def test_a_trial_names_the_steps_it_has() -> None:
    parts = lambda trial: [part.partition("=")[0] for part in code_of(trial).split(" ")]  # noqa: E731
    assert parts(FIXED) == ["evaluation"]
    assert parts(dataclasses.replace(FIXED, target=0.5)) == ["evaluation", "calibration"]
    assert parts(WHOLE) == ["evaluation", "calibration", "training", "timing"]


def test_every_planned_trial_carries_its_code(target: Target) -> None:
    trials = expand(parse_spec(SPEC), target)
    assert all(trial.code == code_of(trial) for trial in trials)
    assert len({trial.code for trial in trials}) == 2, "one for each of the two methods"


def test_the_methods_that_are_found_by_reading_are_those_that_are_registered() -> None:
    found = sources_now().methods()
    assert {name: (cls.__module__, cls.__name__) for name, cls in available().items()} == found


def test_the_tables_name_what_there_is() -> None:
    for entries in (*code_version.ROOTS.values(), *code_version.BESIDES.values(), *code_version.UNDIGESTED.values()):
        for entry in entries:
            assert sources_now().places(entry)
    for entry in code_version.CLOSED:
        module, _, name = entry.partition(":")
        assert not name or name in sources_now().module(module).bound, entry
        assert sources_now().file(module) is not None, entry


# --- words and places -------------------------------------------------------------------------------------------------

REWORDED = [
    (EVALUATE, "No Ray and no global state", "Neither Ray nor global state"),
    (EVALUATE, '"""One trial on its way through the batches."""', '"""A trial."""'),
    (EVALUATE, "# images in a batch; fewer", "# images at once; fewer"),
    (EVALUATE, 'log.info("trial %s failed", self.trial.key, exc_info=error)', 'log.warning("oh no")'),
    (EVALUATE, "trials that are evaluated together have one model", "they need one model"),
    (EVALUATE, "the GPU takes no more work from this process ({run.error})", "no more work, {trials}"),
    (EVALUATE, "_random_state(device: torch.device) -> tuple[Tensor, ...]", "_random_state(device)"),
    ("ablations/trial/free_settings.py", '"AUTO", "KINDS", ', '"KINDS", '),
    ("ablations/measure/context.py", 'what="the plain model is run"', 'what="it is run"'),
    (FAILURES, "ran out while its weights were trained; give", "was short while it was trained: give"),
    (FAILURES, 'log.warning("the GPU\'s memory ran out: %s', 'log.warning("the memory ran out: %s'),
    (CALIBRATE, "the nearest attainable cost, at {setting}, is", "none nearer than {setting}, which is"),
    (CALIBRATE, "a target is met on calibration images, and", "targets need images, and"),
    ("ablations/trial/trial.py", "class TrialError(ValueError):", "class TrialError(ValueError):\n    pass\n"),
    ("ablations/workloads/problems.py", 'TRUNCATED = "truncated"', 'TRUNCATED = "cut short"'),
    ("ablations/workloads/account.py", "_LISTED = 1000", "_LISTED = 10"),
    ("ablations/workloads/base.py", "workload {self.name} holds no image", "no image in {self.name}"),
    ("ablations/workloads/base.py", "outside 0..{self.classes - 1}, the ", "outside the range, that is the "),
    (PROGRESS, "from __future__ import annotations", "from __future__ import annotations\n\nSLIP = 1"),
    ("ablations/measure/finetune/cache.py", 'what=f"the training {digest}"', 'what=f"what is trained as {digest}"'),
    ("reducers/methods/tome.py", '"proportional": (True, False)', '"proportional": (True,)'),
    ("reducers/kit/pairs.py", 'budgets = ("drop", "ratio", "count")', 'budgets = ("drop",)'),
    ("reducers/scores.py", '"class attention x value norm (ATS)"', '"what ATS takes"'),
    ("reducers/methods/ats.py", "Inverse-transform sampling over", "Sampling over"),
    ("reducers/methods/topk.py", 'summary = "keep the K patch tokens', 'summary = "leave the K patch tokens'),
    ("reducers/kit/selection.py", "ties go to the lower index", "among equals the first wins"),
    ("reducers/methods/dynamicvit.py", "standing still for the first 5 epochs", "without moving for five epochs"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new"), REWORDED)
def test_other_words_change_no_key(file: str, old: str, new: str) -> None:
    before, after = codes(), None
    with reading(edited(file, (old, new))):
        after = codes()
    assert before == after


def test_a_file_that_is_moved_and_renamed_changes_no_key(project: Path) -> None:
    moves = {
        "reducers.noise": "reducers.kit.draws",
        "reducers.kit.clustering": "reducers.methods.clusters",
        "ablations.measure.metrics": "ablations.measure.counts",
        "ablations.workloads.digits": "ablations.measure.scenes",
    }
    for old, new in moves.items():
        (project / f"{old.replace('.', '/')}.py").rename(project / f"{new.replace('.', '/')}.py")
    for file in project.rglob("*.py"):
        text = file.read_text()
        for old, new in moves.items():
            parent, name = old.rsplit(".", 1)
            text = text.replace(f"from {old} import", f"from {new} import")
            text = text.replace(f"from {parent} import {name}\n", f"import {new} as {name}\n")
        text = text.replace(
            "from ablations.workloads import digits, ",
            "from ablations.measure import scenes as digits\nfrom ablations.workloads import ",
        )
        file.write_text(text)
    read_again()
    with pytest.raises(CodeError, match=r"reducers\.noise"):
        sources_now().module("reducers.noise")
    assert evaluated() == unchanged()


def test_a_function_that_moves_to_another_module_changes_no_key(project: Path) -> None:
    path = project / "reducers/kit/selection.py"
    text = path.read_text()
    tree = ast.parse(text)
    moved = next(each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "rank_patches")
    source = ast.get_source_segment(text, moved)
    assert source is not None
    path.write_text(text.replace(source, "from reducers.ranking import rank_patches"))
    opening = "import torch\nfrom torch import Tensor\nfrom reducers.tokens import Layout\n"
    (project / "reducers/ranking.py").write_text(f"{opening}\n{source}\n")
    read_again()
    assert evaluated() == unchanged()


# --- numbers ----------------------------------------------------------------------------------------------------------

RANKING = {
    "bat", "diffrate", "dynamicvit", "etps", "evit", "evs", "fixed_pattern", "gtp", "random", "shrinking_pattern",
    "topk", "tps", "zero_tprune",
}  # fmt: skip

NUMBERS: list[tuple[str, str, str, set[str] | frozenset[str]]] = [
    ("reducers/kit/selection.py", "stable=True", "stable=False", RANKING),
    ("reducers/methods/ats.py", "add_(0.5)", "add_(0.25)", {"ats"}),
    ("reducers/methods/ats.py", "    scores = scores.to(", "    scores = 1 * scores.to(", {"ats"}),
    ("reducers/methods/ats.py", 'variant: Variant = "paper"', 'variant: Variant = "official"', {"ats"}),
    ("reducers/kit/clustering.py", "squared.clamp(min=0)", "squared.clamp(min=1e-9)", {"bat", "dpc_knn", "kmedoids"}),
    ("reducers/methods/topk.py", '@register("topk")', '@twice\n@register("topk")', {"topk"}),
    ("reducers/kit/selection.py", "from reducers.scores import find_score", "from math import floor as find_score",
     {"etps", "random", "topk"}),
    ("reducers/methods/dynamicvit.py", '    trained_as = ', '    slip: int = 3\n    trained_as = ', {"dynamicvit"}),
    ("reducers/scores.py", "attention.mean(dim=1)", "attention.sum(dim=1)",
     {"ats", "bat", "diffrate", "etps", "evit", "random", "topk"}),
    ("reducers/masking.py", "_EPS = 1e-6", "_EPS = 1e-5", EVERY),
    ("reducers/noise.py", "2 ** (64 - bits) - 1", "2 ** (64 - bits) - 2", EVERY),
    ("ablations/trial/random.py", ">> 1", ">> 2", EVERY),
    ("ablations/trial/random.py", '"images", "seed"', '"seed"', EVERY),
    ("ablations/trial/random.py", "sha256", "sha1", EVERY),
    ("ablations/records/wilson.py", "1.959963984540054", "1.96", EVERY),
    ("ablations/tasks/classify.py", "argmax(1)", "argmin(1)", EVERY),
    ("ablations/records/paired.py", "ALPHA = ", "ALPHA = 1 + ", set()),
    ("ablations/workloads/base.py", ".float() / 255", ".float() / 256", EVERY),
    ("ablations/workloads/base.py", "min(count, total // 4)", "min(count, total // 5)", set()),
    ("ablations/workloads/preprocess.py", 'resize: Resize = "auto"', 'resize: Resize = "never"', set()),
    ("reducers/digest.py", "hashlib.sha256()", "hashlib.sha1()", EVERY),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "whose"), NUMBERS)
def test_another_number_changes_the_keys_of_what_uses_it_and_of_nothing_else(
    file: str, old: str, new: str, whose: set[str]
) -> None:
    assert users(edited(file, (old, new))) == whose


def test_a_method_inside_another_ones_settings_counts() -> None:
    """EViT that lets ATS choose changes with ATS; one that does not stays."""
    slip = edited("reducers/methods/ats.py", ("add_(0.5)", "add_(0.25)"))
    selected = json.dumps([{"at": [3], "stack": [{"name": "evit", "select": {"name": "ats"}}]}])
    assert changed(slip, dataclasses.replace(FIXED, stages=Stages(selected))) == ["evaluation"]
    assert changed(slip, using("evit")) == []


def test_masks_of_embedded_scenes_are_in_no_digest_of_data_and_so_in_the_code_of_who_sees_them() -> None:
    pairs, cluttered = (dataclasses.replace(using("ats"), workload=name) for name in ("embedded", "embedded:v1"))
    slip = edited("ablations/workloads/pairs.py", ("_MASK_LEVEL = ", "_MASK_LEVEL = 1 + "))
    assert changed(slip, using("ats")) == changed(slip, cluttered) == []
    assert changed(slip, pairs) == ["evaluation"]
    slip = edited("ablations/workloads/digits.py", ("_MASK_LEVEL = ", "_MASK_LEVEL = 1 + "))
    assert changed(slip, using("ats")) == changed(slip, pairs) == []
    assert changed(slip, cluttered) == ["evaluation"]


@pytest.mark.parametrize(
    ("file", "old", "new", "parts"),
    [
        (CALIBRATE, "_CLOSE = 0.002", "_CLOSE = 0.001", ["calibration"]),
        ("ablations/trial/free_settings.py", "1.05", "1.06", ["calibration"]),
        ("ablations/trial/recipe.py", "epochs: int = 30", "epochs: int = 31", ["training"]),
        ("ablations/measure/finetune/schedule.py", "_WARMUP_FROM = ", "_WARMUP_FROM = 2 * ", ["training"]),
        ("ablations/trial/labels.py", '"members", ()', '"members", []', ["training"]),
        ("ablations/workloads/photographs.py", '"color_jitter": 0.3', '"color_jitter": 0.4', ["training"]),
        ("reducers/methods/dynamicvit.py", "    trained_as = ", "    slip: int = 3\n    trained_as = ", ["training"]),
        ("ablations/measure/speed.py", "SHORTEST = 0.1", "SHORTEST = 0.2", ["timing"]),
        (
            "reducers/masking.py",
            "_EPS = 1e-6",
            "_EPS = 1e-5",
            ["evaluation", "calibration", "training", "timing"],
        ),
        ("ablations/records/wilson.py", "Z95 = ", "Z95 = 1 + ", ["evaluation"]),
        ("ablations/records/paired.py", "ALPHA = ", "ALPHA = 1 + ", []),
        ("reducers/runtime/export.py", "OPSET = ", "OPSET = 1 + ", []),
        ("ablations/store/store.py", "from __future__ import annotations", "SLIP = 3", []),
    ],
)
def test_each_number_belongs_to_the_steps_that_use_it(file: str, old: str, new: str, parts: list[str]) -> None:
    assert changed(edited(file, (old, new))) == parts


UNUSED = {
    "reducers/base.py": "__getattr__: an old place, for users' files",
    "reducers/cost_fvcore.py": "*: another count, for the tests",
    "reducers/export.py": "*: the old name of reducers.runtime.export",
    "reducers/hosts/__init__.py": "hosts: for who lists the families",
    "reducers/vit.py": "*: the old name of reducers.runtime",
    "reducers/runtime/export.py": "_translations export_onnx: exported graphs are evaluated by nobody",
    "reducers/placement.py": "every parse_blocks: for who places by hand; a trial's stages name their blocks",
    "reducers/candidates.py": "*: for who searches",
    "reducers/placement_file.py": "*: files of placements, for users",
    "reducers/methods/topk.py": "_keep_count _keep_highest __getattr__: names that moved, for users' files",
    "reducers/registry.py": "available: for who lists the methods",
    "reducers/checks.py": "_named: words",
    EVALUATE: "try_trial: run_group for one trial, for reproduce",
    "ablations/measure/context.py": "versions device_name _brief: words that stand in the row",
    FAILURES: "in_words: words",
    "ablations/measure/speed.py": "expected_seconds: for who tells the time left",
    "ablations/trial/free_settings.py": "stand_in free _number: for plans and labels",
    "ablations/measure/finetune/cache.py": "trained_model: the model alone of what finetuned gives",
    "ablations/measure/finetune/checkpoint.py": "_differences _flat _short: words",
    "ablations/trial/recipe.py": "parse_settings: for the command line",
    "ablations/measure/finetune/__main__.py": "*: the command line",
    "ablations/workloads/base.py": "check_limit spread_subset subset split_calibration: before the digest is taken",
    "reducers/backbones/stvit_r.py": "from_release _renamed: before the digest of the weights is taken",
}
"""Functions in the rooms that make numbers which no trial uses, and why."""

THIRDS = pytest.mark.parametrize("third", sampled(range(3), quick=[0]))  # of the files
PLANTED = ast.parse("planted = 1").body[0]
MEASURED = (
    "measure/evaluate", "measure/metrics", "measure/context", "measure/failures", "measure/calibrate", "measure/speed",
    "trial/free_settings", "trial/random", "workloads/base", "tasks/base", *(f"tasks/{name}" for name in tasks()),
)  # fmt: skip


@THIRDS
def test_every_function_that_makes_numbers_is_in_the_code_of_a_trial(third: int) -> None:
    """A statement planted into each of them in turn is seen: there is no hole in what is reached."""
    files = [*(ROOT / "reducers").rglob("*.py"), *(ROOT / "ablations/measure/finetune").rglob("*.py")]
    files += [ROOT / f"ablations/{name}.py" for name in MEASURED]
    reached, seen = everything_reached(), 0
    for path in sorted(files)[third::3]:
        file = path.relative_to(ROOT).as_posix()
        name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        unused = UNUSED.get(file, "").partition(":")[0].split()
        tree = ast.parse(path.read_text())
        planted: list[tuple[Place, str, str]] = []
        for top in [each for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)]:
            place = Place(name, top.name)
            assert (place in reached) == (unused != ["*"] and top.name not in unused), place
            for function in [each for each in ast.walk(top) if isinstance(each, ast.FunctionDef)]:
                seen += 1
                function.body.insert(0, ast.parse(f"planted_{seen} = 1").body[0])
                planted.append((place, f"planted_{seen}", function.name))
        if planted:
            new = with_tree(name, tree, package=path.name == "__init__.py")
            texts = {place: new.text(place) for place, *_ in planted if place in reached}
            for place, marker, function_name in planted:
                assert place not in texts or f"Name:{marker};" in texts[place], (place, function_name)
    assert seen > 130


def everything_reached() -> set[Place]:
    """All definitions that some trial uses."""
    tables = (code_version.ROOTS, code_version.BESIDES, code_version.UNDIGESTED)
    roots = [root for table in tables for roots in table.values() for root in roots]
    roots += [f"{code_version.TASKS}.{name}" for name in tasks()]
    starts = [place for root in roots for place in sources_now().places(root)]
    return {place for start in (*starts, *sources_now().methods().values()) for place in sources_now().reached(start)}


@THIRDS
def test_a_plain_trial_depends_on_the_whole_runtime(third: int) -> None:
    plain = using()
    rooms = {"reducers.runtime", "reducers.hosts"}
    unused = {"reducers.runtime.export", "reducers.runtime.cross"}  # for exported graphs; for one method alone
    for name in sorted({each for room in rooms for each in sources_now()._below(room)} - rooms - unused)[third::3]:
        file = sources_now().file(name)
        assert file is not None
        tree = ast.parse(file.read_text())
        for top in [each for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)]:
            top.body.append(PLANTED)
            assert changed(with_tree(name, tree), plain) == ["evaluation"], (name, top.name)
            del top.body[-1]


# --- of the process ---------------------------------------------------------------------------------------------------


def test_nothing_is_imported_to_tell_the_code() -> None:
    """Neither torch nor the reducers: a machine that only looks at results needs none of them."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'numpy'), None)); "
        "from ablations.trial.code import code_of; from ablations.trial.trial import trial_from; "
        "print(code_of(trial_from(sys.argv[1]))); "
        "assert 'reducers' not in sys.modules"
    )
    trial = dataclasses.replace(FIXED, target=0.5, measure="speed")
    done = subprocess.run(
        [sys.executable, "-c", program, trial.description], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == code_of(trial)


def test_parts_are_told_apart() -> None:
    assert changed_parts("evaluation=a timing=b", "evaluation=a timing=c") == ["timing"]
    assert changed_parts("evaluation=a", "evaluation=a training=t") == ["training"]
    assert runtime_code("classify") == runtime_code("classify") != training_code(DENSE)
    assert training_code(DENSE) != training_code(RECIPE.stages)


def test_a_users_own_method_is_digested_with_what_it_uses_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []
    for number, flag in (("1", "False"), ("1", "True"), ("2", "True"), ("2", "True  # a remark")):
        file = tmp_path / f"own_{len(codes)}.py"
        file.write_text(
            f"from reducers import TokenReducer\n\n\ndef number():\n    return {number}\n\n\n"
            f"class Own(TokenReducer):\n    uses_random = {flag}\n    at = number()\n"
        )
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(known_reducers._METHODS, "own", module.Own)
        forget()
        codes.append(code_of(using("own")))
    forget()
    assert len(set(codes)) == 3 and codes[2] == codes[3]


def test_packages_in_folders_of_their_own_have_the_same_code(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray unpacks what is shipped to a cluster's nodes."""
    apart = tmp_path / "apart" / "reducers"
    apart.parent.mkdir()
    (project / "reducers").rename(apart)
    monkeypatch.setattr(code_version, "_folders", lambda: {"ablations": project / "ablations", "reducers": apart})
    read_again()
    assert evaluated() == unchanged()


def test_missing_sources_are_named(tmp_path: Path) -> None:
    nothing = Sources({"ablations": tmp_path}, doors=(), closed=(), methods="reducers.methods")
    with reading(nothing), pytest.raises(CodeError, match=r"source of .*evaluate .* install from source"):
        runtime_code("classify")


def test_a_root_that_is_not_there_is_named() -> None:
    with pytest.raises(CodeError, match="ablations.measure.evaluate defines no gone"):
        sources_now().places("ablations.measure.evaluate:gone")
