"""The rules of the house: who may import whom, what library code never does, and how its rooms lie."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ablations.records.kinds import KINDS
from tests.ablations.runs import SPEC, TINY, environment

ROOT = Path(__file__).parent.parent
PACKAGES = ("reducers", "ablations", "analysis")
MAX_SIBLINGS = 8  # files of its own folder that one file imports
MAX_AT_ROOT = 8  # files that lie in `ablations/` itself

Where = tuple[str, int, str]  # file, line, name


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of a file's, found once for all rules."""
    return tuple(ast.walk(parsed(path)))


def sources(*folders: str) -> list[Path]:
    """Every Python file below the folders, which must have some."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found, f"no Python files below {folders}"
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(*folders: str) -> Iterator[Where]:
    """Every module imported by name, wherever in a file the import stands."""
    for path in sources(*folders):
        for node in nodes(path):
            if isinstance(node, ast.Import):
                yield from ((relative(path), node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield relative(path), node.lineno, node.module


def calls(*folders: str) -> Iterator[Where]:
    """Every call of a plain or dotted name."""
    for path in sources(*folders):
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                yield relative(path), node.lineno, ast.unparse(node.func)


def importing(modules: set[str], *folders: str) -> list[Where]:
    return [where for where in imports(*folders) if where[2].split(".")[0] in modules]


def test_reducers_import_neither_ablations_nor_analysis() -> None:
    assert importing({"ablations", "analysis"}, "reducers") == []


def test_ablations_do_not_import_analysis() -> None:
    assert importing({"analysis"}, "ablations") == []


def test_of_the_other_packages_analysis_imports_the_format_of_results_alone() -> None:
    others = importing({"reducers", "ablations"}, "analysis")
    assert [where for where in others if not where[2].startswith("ablations.records")] == []


def test_no_spec_is_known_to_the_analysis_by_its_name() -> None:
    """What a spec's trials answer is told by the kind that it names (``answers:``), whoever wrote it."""
    shipped = {path.stem for path in (ROOT / "ablations/specs").glob("*.yaml")}
    named = [
        (relative(path), node.lineno, node.value)
        for path in sources("analysis")
        for node in nodes(path)
        if isinstance(node, ast.Constant) and node.value in shipped
    ]
    assert len(shipped) > 10 and named == []


def test_the_analysis_has_a_file_for_each_kind_of_answer() -> None:
    kept = {path.stem for path in sources("analysis/questions")} - {"__init__", "base", "beside"}
    assert kept == set(KINDS)


def test_facts_are_told_by_no_word_and_drawn_by_no_picture() -> None:
    leaning = imported_modules("analysis")
    known = ("analysis", "analysis.frame", "analysis.stats")
    others = {each for name, named in leaning.items() if name.startswith("analysis.facts") for each in named}
    assert sorted(each for each in others if not each.startswith("analysis.facts") and each not in known) == []
    assert importing({"matplotlib", "seaborn"}, "analysis/facts") == []
    assert circle(leaning) == []


def test_analysis_needs_no_torch_no_timm_and_no_ray() -> None:
    assert importing({"torch", "torchvision", "timm", "ray"}, "analysis") == []


def test_packages_import_by_full_name() -> None:
    dotted = [
        (relative(path), node.lineno)
        for path in sources(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert dotted == []


def test_ray_is_imported_in_one_room() -> None:
    elsewhere = [where for where in importing({"ray"}, *PACKAGES) if not where[0].startswith("ablations/run/ray/")]
    assert elsewhere == []


MODEL_LIBRARIES = {"timm", "timm.models", "timm.layers", "torchvision", "transformers"}  # timm's optimisers are none


def test_within_the_ablations_models_and_workloads_alone_know_a_model_library() -> None:
    knowing = [where for where in imports("ablations") if where[2] in MODEL_LIBRARIES]
    assert [where for where in knowing if not where[0].startswith(("ablations/models/", "ablations/workloads/"))] == []


def test_the_format_of_results_needs_no_torch_and_no_reducers() -> None:
    assert importing({"torch", "timm", "reducers"}, "ablations/records") == []
    counting = importing({"numpy"}, "ablations/records")
    assert {where[0] for where in counting} == {
        "ablations/records/patch_iou.py", "ablations/records/sign_flips.py"
    }, "tests by drawing need arrays"  # fmt: skip


def test_the_format_of_results_leans_on_nothing_else_of_the_ablations() -> None:
    others = importing({"ablations", "analysis"}, "ablations/records")
    assert [where for where in others if not where[2].startswith("ablations.records")] == []


def test_names_and_columns_and_statistics_of_results_need_the_standard_library_alone() -> None:
    plain = ("columns", "files", "kinds", "locks", "mean", "names", "paired", "streams", "wilson")
    files = {f"ablations/records/{name}.py" for name in plain}
    assert [where for where in importing({"pyarrow", "scipy"}, "ablations/records") if where[0] in files] == []


def test_files_in_a_folder_of_results_are_named_in_one_place() -> None:
    """Help, docstrings and messages may spell them; code may not."""
    named = {"run.json", "progress.json", "profile.json", "results.parquet", "report.html"}
    elsewhere = [
        (relative(path), node.lineno, node.value)
        for path in sources("ablations", "analysis")
        for node in nodes(path)
        if isinstance(node, ast.Constant) and node.value in named
    ]
    assert {where[0] for where in elsewhere} == {"ablations/records/names.py"}


def test_object_stores_are_opened_and_files_are_locked_in_one_room() -> None:
    asking = [where for where in imports(*PACKAGES) if where[2] in {"pyarrow.fs", "fcntl", "msvcrt"}]
    assert {where[0] for where in asking} == {"ablations/records/storage.py"}
    named = [
        relative(path)
        for path in sources(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, ast.Constant) and node.value in {"fcntl", "msvcrt", "AWS_REGION", "SIEVIT_CACHE"}
    ]
    assert set(named) <= {f"ablations/records/{name}.py" for name in ("files", "locks", "storage")}


KNOWING = ("reducers/hosts/", "reducers/backbones/")  # the rooms in which the reducers know a library of models


def test_within_the_reducers_hosts_and_backbones_alone_know_a_model_library() -> None:
    libraries = {"timm", "transformers", "torchvision"}
    assert [where for where in importing(libraries, "reducers") if not where[0].startswith(KNOWING)] == []
    docstrings = {
        ast.get_docstring(node, clean=False)
        for path in sources("reducers")
        for node in nodes(path)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    }
    named = [
        (relative(path), node.lineno, node.value)
        for path in sources("reducers")
        for node in nodes(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings
        and any(library in node.value for library in libraries)
    ]  # fmt: skip
    assert [where for where in named if not where[0].startswith(KNOWING)] == []


def test_a_host_knows_the_protocol_and_no_runtime_and_its_library_comes_with_its_model() -> None:
    behind = ("reducers.runtime", "reducers.methods")
    assert [where for where in imports("reducers/hosts") if where[2].startswith(behind)] == []
    others = [where for where in imports(*PACKAGES) if where[2].startswith("reducers.hosts.")]
    assert {where[2] for where in others if not where[0].startswith("reducers/hosts/")} == {"reducers.hosts.protocol"}


def test_no_circle_leads_from_file_to_file_of_the_reducers() -> None:
    assert circle(imported_modules("reducers")) == []


# methods that run blocks themselves: a small network that predicts attention, blocks under soft masks, a second pass;
# of the kit, semantic tokens that ask the patches
RUN_BLOCKS = {
    f"reducers/methods/{name}.py" for name in ("sttabt/approx_net", "sttabt/concrete_masks", "sttabt/method", "ia_red2")
} | {"reducers/kit/semantic.py"}
# and those that are given the model in training, of which they ask its host
ASK_HOSTS = {f"reducers/methods/{name}.py" for name in ("sttabt/concrete_masks", "ia_red2")}


def test_methods_ask_the_host_and_run_blocks_where_it_is_said() -> None:
    everywhere = ("reducers/methods", "reducers/kit")
    for room, known, where_told in (
        ("reducers.runtime", RUN_BLOCKS, everywhere),
        ("reducers.hosts", ASK_HOSTS, everywhere[:1]),
    ):
        knowing = {where[0] for where in imports(*where_told) if where[2].startswith(room)}
        assert knowing == known, f"{room}: an exception is missing, or no longer needed"


def test_methods_share_through_the_kit_alone() -> None:
    """A method of several files is a folder, whose files may lean on each other; the kit knows no method."""
    leaning = [
        (file, name)
        for file, _, name in imports("reducers/methods", "reducers/kit")
        if name.startswith("reducers.methods") and file != "reducers/methods/__init__.py"
    ]
    inside = {
        (file, name) for file, name in leaning if name.startswith(f"{file.rpartition('/')[0].replace('/', '.')}.")
    }
    assert [where for where in leaning if where not in inside or where[0].count("/") < 3] == []
    assert any(file.startswith("reducers/methods/sttabt/") for file, _ in inside), "the test no longer sees any"


TRAITS = {
    "adaptive", "trained", "cuts_before_values", "needs_class_token", "may_drop_class_token", "needs_teacher",
    "uses_random", "uses_previous_attention", "uses_positions", "oracle",
}  # fmt: skip
NOT_REDUCERS = {"score", "_score", "real", "progress", "training"}  # scores have some of these names, trainings another


def test_who_asks_what_a_reducer_is_asks_its_traits() -> None:
    otherwise = [
        (relative(path), node.lineno, ast.unparse(node))
        for path in sources("reducers", "ablations", "benchmarks")
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in TRAITS and isinstance(node.ctx, ast.Load)
        if ast.unparse(node.value).rpartition(".")[2] not in {"traits", "told", "chooser", "one", *NOT_REDUCERS}
    ]
    assert otherwise == []


def test_library_code_prints_nothing() -> None:
    commands = ("__main__.py", "train_embedded.py")  # programs, which may talk
    printing = [
        where
        for where in calls(*PACKAGES)
        if where[2] == "print" and not where[0].endswith(commands) and not where[0].startswith("ablations/cli/")
    ]
    assert printing == []


def test_nothing_is_loaded_that_can_run_code() -> None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert importing(modules, *PACKAGES) == []
    unsafe = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "pd.read_pickle"}
    assert [where for where in calls(*PACKAGES) if where[2] in unsafe] == []


def test_numpy_arrays_are_loaded_without_pickles() -> None:
    allowing = [
        (relative(path), node.lineno)
        for path in sources(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert allowing == []


def test_no_module_touches_the_import_path() -> None:
    assert [where for where in calls(*PACKAGES) if where[2].startswith("sys.path.")] == []


def module(path: Path) -> str:
    """``ablations/store/index.py`` -> ``ablations.store.index``; a folder's ``__init__`` is the folder."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@functools.cache
def imported_modules(package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports anywhere: inside functions and for type checkers too."""
    known = {module(path): path for path in sources(package)}
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        named: set[str] = set()
        for node in nodes(path):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {each if each in known else node.module for each in inner}
        found[name] = {each for each in named if each in known and each != name}
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle among the arrows, or nothing."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room(name: str) -> str:
    """``ablations.run.ray.driver`` -> ``ablations.run``; what lies at the root of a package is a room of its own."""
    return ".".join(name.split(".")[:2])


def test_no_circle_leads_from_room_to_room_of_the_ablations() -> None:
    between: dict[str, set[str]] = {}
    for name, others in imported_modules("ablations").items():
        between.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    assert circle(between) == []


def test_no_circle_leads_from_file_to_file_of_the_ablations() -> None:
    assert circle(imported_modules("ablations")) == []


def test_no_file_of_the_ablations_leans_on_many_of_its_siblings() -> None:
    leaning = {
        name: len(near)
        for name, others in imported_modules("ablations").items()
        if len(near := [other for other in others if other.rpartition(".")[0] == name.rpartition(".")[0]])
        > MAX_SIBLINGS
    }
    assert leaning == {}


OPENING = {"open_images", "open_workload", "split_calibration", "TrialContext"}


def test_a_model_is_opened_on_images_in_one_place() -> None:
    """A worker's context is made from what the driver opened."""
    places = {("ablations/measure/opening.py", name) for name in OPENING - {"open_workload"}}
    places |= {("ablations/run/contexts.py", "TrialContext"), ("ablations/workloads/__init__.py", "open_images")}
    found = {(file, name) for file, _, name in calls("ablations") if name in OPENING}
    assert found == places


MAX_POSITIONAL = 8


def test_no_function_takes_nine_things_by_their_order() -> None:
    long = [
        (relative(path), node.lineno, node.name)
        for path in sources(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef) and len(node.args.posonlyargs + node.args.args) > MAX_POSITIONAL
    ]
    assert long == []


def given(path: Path) -> set[str]:
    """The names that a file itself makes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    made = {node.name for node in nodes(path) if isinstance(node, kinds)}
    return made | {node.id for node in nodes(path) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_a_name_of_a_file_is_had_from_that_file_alone() -> None:
    """A package's ``__init__`` may hand on what lies below it; any other file only what it makes."""
    made = {module(path): given(path) for path in sources(*PACKAGES, "tests") if path.name != "__init__.py"}
    elsewhere = [
        (relative(path), node.lineno, f"{node.module}:{alias.name}")
        for path in sources(*PACKAGES, "tests")
        if path.parent != ROOT / "tests" / "data"  # a user's files, of an earlier version
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.module in made
        for alias in node.names
        if alias.name not in made[node.module]
    ]
    assert elsewhere == []


def test_few_files_lie_at_the_root_of_the_ablations() -> None:
    assert len([path for path in (ROOT / "ablations").iterdir() if path.is_file()]) <= MAX_AT_ROOT


# what may be missing where, from the innermost part outwards, in one process: importing torch and timm takes seconds
WITHOUT = """
import errno, os, sys
sys.modules["fcntl"] = None  # as on Windows, from the beginning to the end
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
del errno.EDQUOT
everywhere = {"ray", "fvcore", "seaborn", "matplotlib"}
by_trials = everywhere | {"pydantic", "pyarrow", "pandas", "rich"}
for name in by_trials | {"yaml", "sklearn", "scipy"}:
    sys.modules[name] = None  # importing it fails

libraries = {"timm", "transformers", "torchvision"}
for name in libraries:
    sys.modules[name] = None
import reducers, reducers.cost_fvcore
assert reducers.available(), "no library of models is imported until a model of it comes"
for name in libraries:
    del sys.modules[name]
import benchmarks.__main__
out, spec, *options = sys.argv[1:]
assert benchmarks.__main__.main([*options, "--out", out]) == 0

for name in {"yaml", "sklearn", "scipy"}:
    del sys.modules[name]
import ablations.trial.trial, ablations.measure.evaluate, ablations.workloads, ablations.run.train
import ablations.catalogue.docs
from ablations.__main__ import main
assert main(["train"]) == 0

for name in by_trials - everywhere:
    del sys.modules[name]
assert main(["validate", spec, "--model", "digits_vit_tiny"]) == 0
assert main(["run", "--serial", "--out", out + "/run", *"{run}".split(), "--specs", spec]) == 0

for name in everywhere:
    del sys.modules[name]
import analysis.__main__, ablations.measure.finetune.__main__
"""


def test_reducers_and_benchmarks_need_torch_and_timm_alone_trials_no_pydantic_and_serial_runs_no_ray(
    tmp_path: Path,
) -> None:
    """Nor does any of it need what systems other than POSIX lack: locks by ``fcntl``, affinity, EDQUOT."""
    spec = tmp_path / "tiny.yml"
    spec.write_text(SPEC.replace("[48, 96]", "[48]").replace("  - {variant: top-K, set: {method: topk}}\n", ""))
    options = ["--model", "test_vit", "--size", "32", "--batch", "1", "--rounds", "1", "--only", "top-K"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.replace("{run}", " ".join(TINY)), tmp_path, spec, *options, "--processes", "1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| top-K, half at block 1 |" in done.stdout and "matplotlib is not installed" in done.stderr
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", ".json", ".md", ".yml"]
    assert "1 of the 1 trials asked for are finished" in done.stdout
    assert "dynamicvit" in done.stdout, "`train` lists the methods it can train"
