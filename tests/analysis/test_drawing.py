"""Figures are the same whatever its user did to matplotlib, which keeps what its user did; and the report goes where
it can be written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from analysis import drawing, page, style
from analysis.__main__ import main
from analysis.frame import read_results
from analysis.plots.tradeoff import tradeoff
from analysis.report import write_analysis
from tests.analysis.asked import draw
from tests.analysis.synthetic import Maker
from tests.hostile import RC

ROOT = Path(__file__).parents[2]
HOSTILE = dict(line.split(": ", 1) for line in RC.splitlines() if not line.startswith(("backend", "lines", "path")))


def small(out: Path) -> Path:
    maker = Maker(images=30)
    maker.add("my_idea", "only", reducer=[{"name": "new"}], blocks=[2], keep=0.5, accuracy=0.8, coverage=None)
    return maker.save(out, samples=False)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in ("figures", "tables", "report.html")
        for path in ((folder / name).iterdir() if (folder / name).is_dir() else [folder / name])
    }


@pytest.mark.slow
def test_writing_twice_writes_the_same_the_second_time_under_settings_of_a_user(tmp_path: Path) -> None:
    maker = Maker(images=60)
    for name in ("ats", "topk"):
        for share in (0.4, 0.6):
            maker.add("s", name, reducer=[{"name": name}], blocks=[3, 6], keep=share, accuracy=0.8, target=share,
                      adaptive=name == "ats")  # fmt: skip
    results = read_results(maker.save(tmp_path))
    write_analysis(results)
    before = files(tmp_path)
    with mpl.rc_context(HOSTILE):
        theirs = dict(mpl.rcParams)
        write_analysis(results)
        assert dict(mpl.rcParams) == theirs
    assert files(tmp_path) == before and len(before) > 8


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line and then what is left of matplotlib's backend, in a Python of its own."""
    program = (
        "import sys; from analysis.__main__ import main; status = main([sys.argv[1], '-q']); import matplotlib as m; "
        "print(m.rcParams._get_backend_or_none(), m.rcParams['font.size'], 'nobodys_backend' in sys.modules); "
        "sys.exit(status)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MPL") and k != "MATPLOTLIBRC"}
    return subprocess.run(
        [sys.executable, "-c", program, str(out)], cwd=ROOT, env=clean | environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_neither_a_notebooks_backend_nor_a_file_of_settings_reaches_a_report(tmp_path: Path) -> None:
    out = small(tmp_path / "out")
    write_analysis(read_results(out))
    before = files(out)
    (tmp_path / "rc").write_text(RC)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    elsewhere = "module://matplotlib_inline.no_such_backend"  # as of a notebook whose Python is another
    asked = run(out, MATPLOTLIBRC=str(tmp_path / "rc"))
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.split() == ["module://nobodys_backend", "31.0", "False"], "the user's own stays"
    assert files(out) == before
    lost = run(out, MPLBACKEND=elsewhere, MATPLOTLIBRC=str(tmp_path / "binary"), MPLCONFIGDIR="/proc/none", LC_ALL="C")
    assert lost.returncode == 0, lost.stderr
    assert files(out) == before


def test_every_setting_but_the_window_is_matplotlibs_own_while_drawing() -> None:
    with mpl.rc_context(HOSTILE), drawing.settings({"font.size": 7}):
        kept = {k for k, v in mpl.rcParams.copy().items() if v != mpl.rcParamsDefault.copy()[k]}
        assert kept - {*drawing.NOT_OURS, "font.size"} == set() and mpl.rcParams["font.size"] == 7


def test_a_report_goes_elsewhere_where_the_results_may_only_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small(tmp_path / "out")
    (out / "figures").write_text("a file")  # as closed to root as to anybody
    drawn: list[str] = []
    monkeypatch.setattr(page, "save_figure", lambda one, *_: drawn.append(one.name))
    assert main([str(out)]) == 2 and drawn == [], "refused before anything is drawn"
    said = capsys.readouterr().err
    assert f"cannot be written to {out}" in said and f"python -m analysis {out} --to FOLDER" in said
    monkeypatch.undo()
    there = sorted(path.relative_to(out) for path in out.rglob("*"))
    report = tmp_path / "deep" / "report"
    assert main([str(out), "--to", str(report)]) == 0
    assert str(report / "report.html") in capsys.readouterr().out
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == there, "nothing is written to the results"
    again = small(tmp_path / "again")
    write_analysis(read_results(again))
    assert files(report) == files(again), "the same report, its figures and tables beside it"
    assert main([str(out), "--to", "s3://bucket/report"]) == 2 and "folder of this machine" in capsys.readouterr().err
    assert main([str(out), "--to", str(out / "figures")]) == 2 and "--to FOLDER" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a mount of its own")
def test_a_file_system_that_may_only_be_read_is_said_to_be_one(tmp_path: Path) -> None:
    out = small(tmp_path / "out")
    mount = f"mount --bind '{out}' '{out}' && mount -o remount,ro,bind '{out}'"
    inside = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    done = subprocess.run(
        [*inside, f"{mount} && '{sys.executable}' -m analysis '{out}'"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Read-only file system" in done.stderr and "--to FOLDER" in done.stderr


def test_an_interval_that_is_not_known_is_no_bar() -> None:
    maker = Maker(images=30)
    for share in (0.4, 0.6):
        maker.add("s", "only", reducer=[{"name": "new"}], blocks=[2], keep=share, accuracy=0.8, top1_low=None,
                  top1_high=None, dense_gmacs=None)  # fmt: skip
    from analysis.frame import tidy

    axes = draw(tradeoff, tidy(maker.frame())).axes[0]
    (bars,) = axes.containers[0].lines[2]
    assert not any(np.isfinite(segment).all() for segment in bars.get_segments() if len(segment))
    assert axes.child_axes == [], "no share of a cost that nobody knows"
    assert axes.get_xlabel() == style.GMACS
