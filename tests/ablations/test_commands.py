"""How commands are given: OUT in its old place and its new one, what answers without torch, the version, the report."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from ablations.cli import report
from ablations.cli.main import COMMANDS, main, make_parser
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.store.store import Store
from ablations.trial.target import Target
from tests.ablations.results import finished
from tests.ablations.runs import ROOT, SPEC, environment

Ablate = Callable[..., int]


@pytest.fixture
def run_of_two(tmp_path: Path, target: Target) -> Path:
    """OUT of a run of four trials, two of which are finished and have a log."""
    trials = expand(parse_spec(SPEC), target)
    store = Store(tmp_path / "out").create()
    facts = target.facts
    model = {"model": facts.name, "weights_digest": facts.weights_digest, "data_digest": target.data_digest}
    specs = {"tiny": {"title": "Tiny", "trials": [trial.key for trial in trials]}}
    about = {"model": facts.name, "models": [model], "specs": specs, "batch": target.batch, "result_version": 1}
    store.write_json("run.json", about)
    for trial in trials[:2]:
        store.save(finished(trial, facts))
        store.write(f"logs/{trial.key}.log", b"said while it was computed")
    return tmp_path / "out"


def key_in(out: Path) -> str:
    return min(path.stem for path in (out / "trials").iterdir())


# --- OUT --------------------------------------------------------------------------------------------------------------

FORMS = {  # the form that is documented, and what older documents say
    "status --out OUT": ["status OUT"],
    "status --out OUT --watch": ["status OUT --watch", "status --watch OUT"],
    "status --out OUT --watch 2": ["status OUT --watch 2", "status --watch 2 OUT"],
    "log KEY --out OUT": ["log OUT KEY"],
    "reproduce KEY --out OUT --data nowhere": ["reproduce OUT KEY --data nowhere"],
}


@pytest.mark.parametrize(("form", "old"), [(form, old) for form, olds in FORMS.items() for old in olds])
def test_out_in_its_old_place_does_the_same_with_a_note(
    form: str, old: str, run_of_two: Path, ablate: Ablate, capsys: pytest.CaptureFixture[str]
) -> None:
    came = []
    for words in (form, old):
        given = [word.replace("OUT", str(run_of_two)).replace("KEY", key_in(run_of_two)) for word in shlex.split(words)]
        status = ablate(*given) if "--watch" not in words else ablate_without_waiting(given)
        came.append((status, *capsys.readouterr()))
    (status, printed, said), (old_status, old_printed, old_said) = came
    assert (old_status, old_printed) == (status, printed)
    note = f"note: OUT as a word of its own is the old form; write --out {run_of_two}\n"
    assert old_said == note + said and "note:" not in said
    if not form.startswith("reproduce"):  # whose images are not there
        assert status == 0 and printed and said == ""


def ablate_without_waiting(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ablations.store.status.time.sleep", lambda seconds: None)
        patch.setattr("ablations.store.status.watch.__kwdefaults__", {"sleep": lambda seconds: None, "times": 1})
        return main(words)


@pytest.mark.parametrize("words", ["status A --out B", "log A 3f9c --out B", "reproduce A 3f9c --out B",
                                   "status --watch A --out B"])  # fmt: skip
def test_two_places_are_refused(words: str, ablate: Ablate, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate(*words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "A" in said and "B" in said


def test_commands_look_where_a_run_writes_unless_told_otherwise(
    run_of_two: Path, ablate: Ablate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_of_two.parent)
    (run_of_two.parent / "results").mkdir()
    run_of_two.rename("results/embedded")
    for words in (["status"], ["log", "3f9c"], ["report"]):
        assert ablate(*words) == 2
        assert "results holds no run.json, but folders in it do; give one of them: --out results/embedded" in (
            capsys.readouterr().err
        )
    Path("results/embedded").rename("elsewhere")
    Path("results").rmdir()
    Path("elsewhere").rename("results")
    assert ablate("status") == 0 and "2 of 4 trials finished" in capsys.readouterr().out
    assert ablate("log", key_in(Path("results"))) == 0 and "said while it was computed" in capsys.readouterr().out


def test_out_is_an_option_of_every_command_that_has_one() -> None:
    parser = make_parser()
    for words in ("run", "status", "log 3f9c", "reproduce 3f9c", "train", "report"):
        assert parser.parse_args([*words.split(), "--out", "some/where"]).out == Path("some/where"), words
    assert parser.parse_args(["status", "--out", "s3://bucket/a"]).out == "s3://bucket/a", "no slash is lost"


# --- without torch ----------------------------------------------------------------------------------------------------

LIGHT = """
import contextlib, io, sys
from ablations.cli.main import main
heavy = []
for words in {words!r}:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    assert status == 0 and printed.getvalue(), (words, status)
    loaded = {{"torch", "timm", "ray", "reducers", "analysis"}} & set(sys.modules)
    assert not loaded, (words, loaded)
print("none")
"""


def test_help_version_list_status_and_log_import_no_torch(run_of_two: Path) -> None:
    """They answer in a second; torch alone takes several. All in one process: what one imports, all have."""
    helps = [[*words, "--help"] for words in ([], *([name] for name in COMMANDS))]
    out = str(run_of_two)
    looks = [["status", "--out", out], ["log", key_in(run_of_two), "--out", out]]
    words = [*helps, ["--version"], ["list"], *looks]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(words=words)], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "none\n"), done.stderr


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert end.value.code == 0 and capsys.readouterr().out == f"sievit {version}\n"


def test_verbose_is_understood_before_a_command_and_after_it() -> None:
    parser = make_parser()
    assert parser.parse_args(["-v", "list"]).verbose and parser.parse_args(["list", "-v"]).verbose
    assert not parser.parse_args(["list"]).verbose


# --- the report -------------------------------------------------------------------------------------------------------


def sievit(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command from another folder: this package is found by its path, as an installed one is."""
    paths = {**environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ablations", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=paths, capture_output=True, text=True, timeout=120, check=False)


def put_analysis(folder: Path, code: str) -> None:
    (folder / "analysis").mkdir()
    (folder / "analysis" / "__init__.py").touch()
    (folder / "analysis" / "__main__.py").write_text(code)


def test_report_draws_what_the_analysis_draws_and_ends_like_it(run_of_two: Path, tmp_path: Path) -> None:
    """Also where somebody stands in a folder with an analysis of their own."""
    put_analysis(tmp_path, "raise SystemExit('not this one')")
    done = sievit("report", "--out", "out", "--to", "there", cwd=tmp_path)
    assert done.returncode == 1 and "error: no trial finished" in done.stderr, (
        "no spec's trial as the analysis reads it"
    )
    assert (tmp_path / "there" / "report.html").exists() and not (run_of_two / "report.html").exists()


@pytest.mark.parametrize(("ended", "status"), [(0, 0), (1, 1), (2, 2), (-15, 143)])
def test_the_status_of_the_analysis_is_passed_on(
    ended: int, status: int, run_of_two: Path, ablate: Ablate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package beside this one is the one that is asked: here one that tells what it was given, and ends as told."""
    end = f"os.kill(os.getpid(), {-ended})" if ended < 0 else f"sys.exit({ended})"
    put_analysis(
        tmp_path, f"import os, pathlib, sys\npathlib.Path('given').write_text(' '.join(sys.argv[1:]))\n{end}\n"
    )
    monkeypatch.setattr(report, "_TOP", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert ablate("report", "--out", run_of_two, "--to", "there", "-q") == status
    assert Path("given").read_text() == f"--quiet --to there -- {run_of_two}"


def test_every_command_of_the_help_texts_is_understood() -> None:
    """What follows `sievit` in an example, up to the words that explain it."""
    parser, count = make_parser(), 0
    for name in COMMANDS:
        action = next(a for a in parser._actions if a.dest == "==SUPPRESS==" or getattr(a, "choices", None))
        text = action.choices[name].epilog.replace("\\\n", " ")  # type: ignore[index]
        for line in re.findall(r"^  (?:RAY_ADDRESS=\S+ )?sievit (.*)$", text, re.MULTILINE):
            words = shlex.split(re.split(r"\s{3,}(?![-])|  (?=[a-z])", re.sub(r" +(--)", r" \1", line))[0])
            parser.parse_args(words)
            count += 1
    assert count >= 25
