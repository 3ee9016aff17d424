"""Results in an object store are fetched, drawn and sent back, and only what changed travels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis import remote
from analysis.__main__ import main
from analysis.frame import AnalysisError, read_results
from tests.analysis.runs import scores
from tests.analysis.synthetic import Maker
from tests.analysis.test_recommendation import record
from tests.s3 import local_s3

pytestmark = pytest.mark.usefixtures("plain_figures")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with local_s3() as uri:
        yield uri


@pytest.fixture
def uploaded(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small run in the bucket; its URI."""
    monkeypatch.setenv("SIEVIT_CACHE", str(tmp_path / "cache"))
    maker = Maker(images=40)
    scores(maker)
    folder = maker.save(tmp_path / "run")
    uri = f"{bucket}/{tmp_path.name}"
    place = remote.open_place(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            place.storage.write(str(path.relative_to(folder)), path.read_bytes())
    return uri


def test_a_report_is_drawn_from_the_object_store_into_it(
    uploaded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([uploaded]) == 0
    assert f"{uploaded}/report.html" in capsys.readouterr().out
    place = remote.open_place(uploaded)
    assert place.storage.entry("report.html") is not None
    assert place.storage.entries("figures") and place.storage.entries("tables")


def test_only_what_changed_is_fetched_again(uploaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, folder = remote.open_place(uploaded), tmp_path / "copy"
    place.fetch(folder)
    assert len(read_results(folder).finished) == len(read_results(tmp_path / "run").finished)
    copied: list[str] = []
    copy = remote.Place._copy_one
    monkeypatch.setattr(
        remote.Place, "_copy_one", lambda self, name, *rest: (copied.append(name), copy(self, name, *rest))
    )
    place.fetch(folder)
    assert copied == []
    place.storage.write("run.json", b"{}")
    place.fetch(folder)
    assert copied == ["run.json"]


def test_what_is_no_longer_there_is_in_no_report(uploaded: str, tmp_path: Path) -> None:
    """Another run took the place of the first, and the copy on this machine knows only the first."""
    place, folder = remote.open_place(uploaded), tmp_path / "copy"
    place.fetch(folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "of_the_first.svg").write_text("<svg/>")
    place.storage.delete("results.parquet")
    images = sorted((folder / "images").iterdir())
    place.storage.delete(f"images/{images[0].name}")
    place.storage.write("trials/0123456789abcdef.parquet", (folder / "results.parquet").read_bytes())
    place.fetch(folder)
    assert not (folder / "results.parquet").exists() and not (folder / "figures").exists()
    assert sorted((folder / "images").iterdir()) == images[1:]
    assert [path.name for path in (folder / "trials").iterdir()] == ["0123456789abcdef.parquet"]


def test_a_run_that_was_stopped_is_read_from_its_trials(uploaded: str, tmp_path: Path) -> None:
    place = remote.open_place(uploaded)
    place.storage.write("trials/0123456789abcdef.parquet", place.storage.read("results.parquet"))
    place.storage.delete("results.parquet")
    assert len(read_results(place.fetch(tmp_path / "copy")).trials) == len(read_results(tmp_path / "run").trials)


def test_places_that_cannot_be_read_are_named(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AnalysisError, match=r"cannot be opened .* s3://BUCKET/FOLDER"):
        remote.open_place("nonsense://place")
    assert main([f"{bucket}-missing/run"]) == 2
    assert "s3://sievit-tests-missing/run" in capsys.readouterr().err
    assert main([f"{bucket}/empty"]) == 2


@pytest.mark.parametrize("cache", ["/proc/nowhere", "a file", "locked"])
def test_where_no_copy_can_be_kept_the_setting_is_named_and_nothing_is_fetched(
    cache: str, uploaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the report goes elsewhere: the results come to this machine in any case."""
    if cache != "/proc/nowhere":
        place = tmp_path / "closed"
        monkeypatch.setenv("SIEVIT_CACHE", str(place))
        if cache == "a file":
            place.write_text("")
        else:
            with remote.local_folder(uploaded) as copy:
                pass
            (copy / ".lock").unlink()
            (copy / ".lock").mkdir()
    else:
        monkeypatch.setenv("SIEVIT_CACHE", cache)
    fetched: list[Path] = []
    monkeypatch.setattr(remote.Place, "fetch", lambda self, folder: fetched.append(folder))
    for more in ([], ["--to", str(tmp_path / "report")]):
        assert main([uploaded, *more]) == 2
        said = capsys.readouterr().err
        assert f"error: no copy of {uploaded} can be kept here" in said and "SIEVIT_CACHE=FOLDER" in said
        assert "Traceback" not in said
    assert fetched == [] and not (tmp_path / "report").exists()
    monkeypatch.undo()
    monkeypatch.setenv("SIEVIT_CACHE", str(tmp_path / "chosen"))
    with remote.local_folder(uploaded) as copy:
        assert copy.is_dir() and copy.is_relative_to(tmp_path / "chosen")


def test_the_page_of_a_search_is_drawn_from_the_object_store_into_it(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIEVIT_CACHE", str(tmp_path / "cache"))
    uri = f"{bucket}/{tmp_path.name}"
    assert main(["--recommendation", uri]) == 2
    assert "recommend.json is not there: `sievit recommend --out s3://" in capsys.readouterr().err
    place = remote.open_place(uri)
    for label in ("ToMe", "another"):
        place.storage.write("recommend.json", json.dumps(record(label)).encode())
        assert main(["--recommendation", uri]) == 0
        assert capsys.readouterr().out.strip() == f"{uri}/recommend.html"
        assert f"use {label}" in place.storage.read("recommend.html").decode()
    assert sorted(place.storage.entries("figures")) == [
        "recommend-0-50-confirmed.png", "recommend-0-50-confirmed.svg"
    ]  # fmt: skip
    place.storage.write("recommend.json", b"{")
    assert main(["--recommendation", uri]) == 2
    assert "cannot be used" in capsys.readouterr().err
