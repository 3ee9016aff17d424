"""What the documents of commit 3d191f9 name goes on being there: imports, commands, targets of make, shipped specs.

Users of that version have these words in their files and in their fingers. A module may move; its old path is then kept
as a file of a few lines, and goes on being listed here:

    # reducers/budget.py, after its contents went to reducers/kit/budget.py
    import warnings
    from typing import Any

    from reducers.kit import budget as _moved

    warnings.warn("reducers.budget is now reducers.kit.budget", DeprecationWarning, stacklevel=2)

    def __getattr__(name: str) -> Any:
        return getattr(_moved, name)

``stacklevel=2`` makes the warning the importer's own, so that it is shown to who can mend it. ``__getattr__`` hands
over the very objects: a class has one identity under both names, and what was registered once is not registered twice.
The tests accept a DeprecationWarning whose text names where the thing is now, and nothing else. Nothing of the packages
themselves may import an old path; there warnings are errors.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.documents import OURS, ROOT, documented_commands, documented_imports, documents

# README, CONTRIBUTING, docs, examples at 3d191f9: module -> names; no name: the module itself
IMPORTS: dict[str, tuple[str, ...]] = {
    "reducers": (
        "ATS", "Budget", "Count", "Decision", "Drop", "EViT", "Identity", "Keep", "Layout", "Merge", "Mix", "Placement",
        "RandomDrop", "Ratio", "ReducedViT", "ReducerError", "SCORES", "Shared", "Stack", "State", "ToMe", "TokenBatch",
        "TokenMap", "TokenReducer", "TopK", "Trace", "UnsupportedModel", "at", "available", "build", "every",
        "parse_blocks", "parse_budget", "placement_from", "reduce_tokens", "register",
    ),
    "reducers.base": ("Decision", "State", "TokenReducer"),
    "reducers.budget": ("Budget", "Count", "Drop", "Ratio", "parse_budget"),
    "reducers.errors": ("ReducerError", "UnsupportedModel"),
    "reducers.export": ("export_onnx",),
    "reducers.maps": ("Keep", "Mask", "Merge", "Mix", "TokenMap"),
    "reducers.placement": ("at", "every", "placement_from"),
    "reducers.registry": ("available", "build", "register"),
    "reducers.scores": (
        "SCORES", "class_attention", "class_attention_value_norm", "find_score", "random", "value_norm",
    ),
    "reducers.signals": ("Signals",),
    "reducers.stack": ("Stack",),
    "reducers.tokens": ("Layout", "TokenBatch"),
    "reducers.trace": ("Trace",),
    "reducers.vit": ("ReducedViT", "Shared", "reduce_tokens"),
    "reducers.methods": (
        "ATC", "ATS", "AViT", "BAT", "BackTracking", "DPCKNN", "DTPS", "DiffRate", "DynamicViT", "ETPS", "EViT",
        "FixedPattern", "GTP", "HVTPool", "IARED2", "Identity", "KMedoids", "PatchMerger", "PiToMe", "RandomDrop",
        "STTABT", "STViT", "STViTR", "ShrinkingPattern", "SiT", "Sinkhorn", "SmallInput", "ToFu", "ToMe",
        "TokenLearner", "TokenPooling", "TopK", "ZeroTPrune",
    ),
    # each page below docs/methods names the file it is made from
    "reducers.methods.atc": ("ATC",),
    "reducers.methods.ats": ("ATS",),
    "reducers.methods.avit": ("AViT",),
    "reducers.methods.back_tracking": ("BackTracking",),
    "reducers.methods.bat": ("BAT",),
    "reducers.methods.diffrate": ("DiffRate",),
    "reducers.methods.dpc_knn": ("DPCKNN",),
    "reducers.methods.dynamicvit": ("DynamicViT",),
    "reducers.methods.evit": ("EViT",),
    "reducers.methods.fixed_pattern": ("FixedPattern",),
    "reducers.methods.gtp": ("GTP",),
    "reducers.methods.hvt_pool": ("HVTPool",),
    "reducers.methods.ia_red2": ("IARED2",),
    "reducers.methods.identity": ("Identity",),
    "reducers.methods.kmedoids": ("KMedoids",),
    "reducers.methods.patch_merger": ("PatchMerger",),
    "reducers.methods.pitome": ("PiToMe",),
    "reducers.methods.random_drop": ("RandomDrop",),
    "reducers.methods.shrinking_pattern": ("ShrinkingPattern",),
    "reducers.methods.sinkhorn": ("Sinkhorn",),
    "reducers.methods.sit": ("SiT",),
    "reducers.methods.small_input": ("SmallInput",),
    "reducers.methods.sttabt": ("STTABT",),
    "reducers.methods.stvit": ("STViT",),
    "reducers.methods.stvit_r": ("STViTR",),
    "reducers.methods.tofu": ("ToFu",),
    "reducers.methods.token_learner": ("TokenLearner",),
    "reducers.methods.token_pooling": ("TokenPooling",),
    "reducers.methods.tome": ("ToMe",),
    "reducers.methods.topk": ("TopK", "keep_count", "keep_highest"),
    "reducers.methods.tps": ("DTPS", "ETPS"),
    "reducers.methods.zero_tprune": ("ZeroTPrune",),
    "ablations.finetune": ("Recipe", "finetuned", "parse_recipe", "trained_model"),
    "ablations.workloads": ("LoadedModel", "Workload", "WorkloadError", "open_model", "open_workload"),
    "analysis.plots": (),
}  # fmt: skip

# what stands behind `python -m`: every command and every form of it that the documents and the help texts show
COMMANDS = """\
ablations --help
ablations list --help
ablations list
ablations list --reducers
ablations list --trials
ablations --version
ablations validate --help
ablations validate
ablations validate my.yaml
ablations validate my_question.yaml --workload embedded --model digits_vit_tiny
ablations run --help
ablations run
ablations run --serial
ablations run --serial --specs k_values
ablations run --specs k_values class_token --limit 200 --out out/quick
ablations run --workload imagefolder --data IMAGES --model deit_small_patch16_224 --out out/imagenet
ablations run --specs model_scaling --workload timm:SPEC --data D --model "deit_tiny_patch16_224 deit3_base"
ablations run --workers 32 --workload imagefolder --data ~/val --out s3://BUCKET/runs/deit-small
ablations run --out OUT --batch 8 --train-data DIR --weights FILE --time-limit 0 --strict --download --dry-run
ablations run --profile
ablations status --help
ablations status OUT
ablations status OUT --watch
ablations status OUT --watch 30
ablations status s3://bucket/runs/a
ablations status --watch OUT
ablations status --out OUT --watch
ablations log --help
ablations log OUT 3f9c
ablations log 3f9c --out OUT
ablations reproduce --help
ablations reproduce 3f9c --out OUT
ablations reproduce 3f9c1b --out s3://bucket/runs/a --data /mnt/imagenet/val
ablations reproduce 3f9c --out OUT --train-data DIR --weights FILE --scratch DIR
ablations train --help
ablations train
ablations train all
ablations train dynamicvit tps
ablations train avit --set epochs=1 images=512
ablations train dynamicvit --at 3,6,9 --settings '{"budget": {"ratio": 0.5}}' --out OUT --limit 5
ablations train dynamicvit --workload imagefolder --data D --train-data T --weights W --model M
ablations report --help
ablations report
ablations report --out OUT --to DIR --quiet
ablations docs --help
ablations docs
ablations docs --check
ablations.finetune --help
ablations.finetune --out out/ats --at 3-11 --reducer '{"name": "ats", "budget": {"count": 20}}'
ablations.measure.finetune --help
ablations.measure.finetune --out out/ats --at 3-11 --reducer '{"name": "ats", "budget": {"count": 20}}'
ablations.measure.finetune --out out/dense --set epochs=3 seed=1
ablations.measure.finetune --workload imagefolder --data D --weights W --stages '[]' --limit 5 --no-evaluation --out OUT
ablations.workloads.train_embedded --help
ablations.workloads.train_embedded --out ablations/models/weights
ablations.workloads.train_pairs --help
ablations.workloads.train_pairs --out ablations/models/weights
ablations.measure.separation --help
ablations.measure.separation --workload embedded:v1 --limit 100
ablations.measure.separation --card ablations/models/weights
analysis --help
analysis OUT
analysis --quiet OUT
benchmarks --help
benchmarks
benchmarks speed --help
benchmarks speed --model deit_tiny_patch16_224 --batch 1 32 --size 224 384 --dtype float32 bfloat16 --allocator steady
benchmarks scaling --help
benchmarks scaling --model deit_tiny_patch16_224
benchmarks gpu --help
benchmarks gpu --weights FILE --data DIR
benchmarks record --help
benchmarks record --weights FILE --data DIR
"""

TARGETS = (
    "ablations", "ablations-gpu", "bench", "bench-gpu", "bench-scaling", "clean", "docs", "gpu-folder", "help", "lint",
    "recommend", "report", "smoke", "test", "test-slow", "train", "weights",
)  # fmt: skip
VARIABLES = (
    "WORKLOAD=imagefolder", "DATA=imagenet/val", "MODEL=deit_small_patch16_224", "WEIGHTS=random", "LIMIT=5000",
    "SPECS=k_values evit_stacking", "OUT=results/deit-small", "BATCH=4", "WORKERS=2", "TRAIN_DATA=train", "PROFILE=1",
    "METHOD=avit ia_red2", "SET=epochs=6 images=4096", "TESTS=tests/reducers",
)  # fmt: skip

SPECS = (
    "adaptivity", "budget_transfer", "class_token", "evit_stacking", "finetuning", "finetuning_short", "hvt",
    "k_values", "methods", "model_scaling", "runtime", "sampling_method", "score_functions", "single_multi_stage",
    "stacks", "stage_placement", "trained_methods",
)  # fmt: skip

# --- one process tries all of it --------------------------------------------------------------------------------------

NEW_HOME = "reducers.budget"  # stands for the new place of a module that was moved in a test
MOVED = {  # as the text above says it is done, and as it must not be done
    "moved_well": f"moved_well of the reducers is now {NEW_HOME}",
    "moved_vaguely": "the reducers' moved_vaguely is deprecated",
    "moved_nowhere": "moved_nowhere is now reducers.kit.nowhere",
}
SHIM = """\
import warnings
from typing import Any

from reducers import budget as _moved

warnings.warn({text!r}, DeprecationWarning, stacklevel=2)

def __getattr__(name: str) -> Any:
    return getattr(_moved, name)
"""


EARLIER = "reducer_3d191f9"  # in tests/data


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every import and command: a fresh process, in which nothing was imported before."""
    moved = tmp_path_factory.mktemp("moved")
    for name, text in MOVED.items():
        (moved / f"{name}.py").write_text(SHIM.format(text=text))
    imports = [*IMPORTS.items(), *documented_imports(), *((name, ("Ratio",)) for name in MOVED), ("reducers.gone", ())]
    imports += [(EARLIER, ())]
    commands = [(words[0], tuple(words[1:])) for words in map(shlex.split, COMMANDS.splitlines())]
    known = {(module, words[0] if words and words[0].isalpha() else "") for module, words in commands}
    commands += [(module, (*filter(None, [word]), "--help")) for module, word in documented_commands() - known]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(moved), str(ROOT / "tests" / "data")]),
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "probe_public.py"], cwd=ROOT,
        input=json.dumps({"imports": imports, "commands": commands}),
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {
        "imports": list(zip(imports, found["imports"], strict=True)),
        "commands": list(zip(commands, found["commands"], strict=True)),
    }


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        if importlib.util.find_spec(name) is not None:
            return True
        module, _, attribute = name.rpartition(".")
        return bool(module) and hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


def names_a_place(text: str, old: str) -> bool:
    """Whether a warning says where the thing is by now: a module or name of ours that is there, and is not the old."""
    dotted = re.findall(rf"\b(?:{'|'.join(OURS)})(?:\.\w+)+", text)
    return any(name != old and resolves(name) for name in dotted)


def faults(module: str, came: list[Any]) -> list[str]:
    """What is wrong with an import or a command: an error, or a warning that does not help."""
    error, *_, texts = came
    wrong = [f"{module}: {error}"] if error else []
    return wrong + [f"{module}: says no new place: {text}" for text in texts if not names_a_place(text, module)]


# --- tests ------------------------------------------------------------------------------------------------------------


def test_every_import_of_the_documents_works(tried: dict[str, Any]) -> None:
    asked = [one for one in tried["imports"] if one[0][0] in IMPORTS or one[0] in documented_imports()]
    assert len(asked) >= len(IMPORTS)
    assert [fault for (module, _), came in asked for fault in faults(module, came)] == []


def test_a_file_of_reducers_written_for_that_version_is_imported(tried: dict[str, Any]) -> None:
    (came,) = [came for (module, _), came in tried["imports"] if module == EARLIER]
    assert faults(EARLIER, came) == []


def test_every_command_of_the_documents_understands_its_words(tried: dict[str, Any]) -> None:
    assert len(tried["commands"]) >= len(COMMANDS.splitlines())
    wrong = [fault for (module, _), came in tried["commands"] for fault in faults(module, [None, came[2]])]
    refused = [f"{shlex.join([module, *words])}: {came[1]}" for (module, words), came in tried["commands"] if came[0]]
    assert wrong + refused == []
    helps = [came[1] for (_, words), came in tried["commands"] if words[-1:] == ("--help",)]
    assert all(text.startswith("usage:") for text in helps)


def test_a_module_that_moved_as_described_is_accepted_and_any_other_is_not(tried: dict[str, Any]) -> None:
    came = {module: faults(module, found) for (module, _), found in tried["imports"]}
    assert came["moved_well"] == []
    assert came["moved_vaguely"] == [f"moved_vaguely: says no new place: {MOVED['moved_vaguely']}"]
    assert came["moved_nowhere"] == [f"moved_nowhere: says no new place: {MOVED['moved_nowhere']}"]
    assert came["reducers.gone"] == ["reducers.gone: No module named 'reducers.gone'"]
    warned = {module: found[1] for (module, _), found in tried["imports"]}
    assert warned["moved_well"] == [MOVED["moved_well"]], "said once, and to who imports it"


def test_the_documents_are_read_and_name_no_unknown_target() -> None:
    named = {(module, name) for module, names in documented_imports() for name in names}
    assert {("reducers.reducer", "TokenReducer"), ("reducers", "reduce_tokens")} <= named
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents())
    targets = set(re.findall(r"(?:^ *|`)make (?:[A-Z]+=\S* )*([a-z][a-z-]*)", text, re.MULTILINE))
    assert {"ablations", "test", "train"} <= targets <= set(TARGETS)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_knows_every_target_and_variable(tmp_path: Path) -> None:
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    assert re.search(r"^bench-gpu:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    plannable = [target for target in TARGETS if target != "bench-gpu"]  # calls make itself: no dry run stops it
    command = ["make", "--dry-run", f"VENV={tmp_path}", *VARIABLES, *plannable]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for variable in VARIABLES:
        assert variable.partition("=")[2] in done.stdout, variable


def test_the_shipped_specs_are_where_the_documents_say() -> None:
    found = {path.stem for path in (ROOT / "ablations" / "specs").glob("*.yaml")}
    assert set(SPECS) <= found


def test_the_installed_command_is_still_called_sievit() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["sievit"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
