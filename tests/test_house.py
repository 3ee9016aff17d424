"""The rules of the house: who may import whom, what library code never does, and how long a file may grow."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("reducers", "ablations", "analysis")
MAX_LINES = 320

Where = tuple[str, int, str]  # file, line, name


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


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
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                yield from ((relative(path), node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield relative(path), node.lineno, node.module


def calls(*folders: str) -> Iterator[Where]:
    """Every call of a plain or dotted name."""
    for path in sources(*folders):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                yield relative(path), node.lineno, ast.unparse(node.func)


def importing(modules: set[str], *folders: str) -> list[Where]:
    return [where for where in imports(*folders) if where[2].split(".")[0] in modules]


def test_reducers_import_neither_ablations_nor_analysis() -> None:
    assert importing({"ablations", "analysis"}, "reducers") == []


def test_ablations_do_not_import_analysis() -> None:
    assert importing({"analysis"}, "ablations") == []


def test_analysis_reads_files_and_imports_no_other_package_of_ours() -> None:
    assert importing({"reducers", "ablations"}, "analysis") == []


def test_analysis_needs_no_torch_no_timm_and_no_ray() -> None:
    assert importing({"torch", "torchvision", "timm", "ray"}, "analysis") == []


def test_packages_import_by_full_name() -> None:
    dotted = [
        (relative(path), node.lineno)
        for path in sources(*PACKAGES)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert dotted == []


def test_ray_is_imported_in_the_runner_only() -> None:
    elsewhere = [where for where in importing({"ray"}, *PACKAGES) if not where[0].startswith("ablations/runner")]
    assert elsewhere == []


def test_within_the_reducers_timm_is_imported_below_vit_only() -> None:
    elsewhere = [where for where in importing({"timm"}, "reducers") if not where[0].startswith("reducers/vit/")]
    assert elsewhere == []


# methods that run blocks themselves: a small network that predicts attention, blocks under soft masks, a second pass
RUN_BLOCKS = {f"reducers/methods/{name}.py" for name in ("approx_net", "concrete_masks", "sttabt", "ia_red2")}


def test_methods_do_not_know_the_host_model() -> None:
    knowing = [where for where in imports("reducers/methods") if where[2].startswith("reducers.vit")]
    assert [where for where in knowing if where[0] not in RUN_BLOCKS] == []
    assert {where[0] for where in knowing} == RUN_BLOCKS, "an exception that is no longer needed"


def test_library_code_prints_nothing() -> None:
    commands = ("__main__.py", "train_embedded.py")  # programs, which may talk
    printing = [where for where in calls(*PACKAGES) if where[2] == "print" and not where[0].endswith(commands)]
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
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert allowing == []


def test_no_module_touches_the_import_path() -> None:
    assert [where for where in calls(*PACKAGES) if where[2].startswith("sys.path.")] == []


def test_no_file_has_grown_too_long() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES)}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def run_without(modules: set[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in a Python in which these packages cannot be imported."""
    block = f"import sys\nfor name in {sorted(modules)!r}:\n    sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + statement], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_reducers_run_with_torch_and_timm_alone() -> None:
    others = {"ray", "pydantic", "pyarrow", "pandas", "fvcore", "seaborn", "matplotlib", "yaml", "sklearn", "scipy"}
    done = run_without(others, "import reducers; assert reducers.available()")
    assert done.returncode == 0, done.stderr


def test_a_trial_runs_without_ray_pydantic_pyarrow_and_pandas() -> None:
    others = {"ray", "pydantic", "pyarrow", "pandas", "fvcore", "seaborn", "matplotlib", "rich"}
    done = run_without(others, "import ablations.trial.trial, ablations.measure.evaluate, ablations.workloads")
    assert done.returncode == 0, done.stderr
