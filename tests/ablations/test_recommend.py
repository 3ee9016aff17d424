"""``sievit recommend`` from wishes to files: on the embedded model, with few methods and few images."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

import reducers
from ablations.cli import report
from ablations.cli.main import main
from ablations.cli.recommend import goals_of
from ablations.records.names import images_file, row_file
from ablations.records.parquet import owned, parquet
from ablations.records.schema import IMAGE_SCHEMA
from ablations.run.recommend import call, pieces, singles
from ablations.run.recommend.pieces import Pieces
from ablations.search.parts import part
from ablations.search.space import Method
from ablations.store.store import Store
from ablations.trial.trial import Trial
from ablations.workloads import open_model
from ablations.workloads.embedded import embedded_workload
from analysis.__main__ import main as analysis
from analysis.recommendation import read_found
from tests.s3 import local_s3
from tests.samples import sampled

IMAGES = 150
FEW = """
name: few
title: Few
base: {x: target, target: [0.5], set: {at: 3}, stages: [{at: $at, stack: [{name: $method, budget: {ratio: auto}}]}]}
arms:
- {variant: top-K, set: {method: topk}}
- {variant: EViT, stages: [{at: [3, 6, 9], stack: [{name: evit, budget: {ratio: auto}}]}]}
- {variant: random, set: {method: random}}
"""


@pytest.fixture(autouse=True, scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two published methods and a control, and a space of two methods."""
    path = tmp_path_factory.mktemp("spec") / "few.yaml"
    path.write_text(FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(singles, "METHODS", str(path))
        patch.setattr(call, "methods", lambda fits, block: (Method("topk"), Method("tome")))
        yield


def recommend(out: Path, *words: str, candidates: int = 4, drawn: bool = False, how: str = "--serial") -> int:
    with pytest.MonkeyPatch.context() as patched:
        if not drawn:  # the analysis is a process of its own, and takes seconds to start
            patched.setattr(report, "draw_recommendation", lambda out: 0)
        asked = ["--limit", str(IMAGES), "--candidates", str(candidates), "--out", str(out)]
        return main(["recommend", how, *asked, *(words or ("--cost", "0.5"))])


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "recommend.json").read_text())
    return found


def journal(out: Path) -> list[dict[str, Any]]:
    (path,) = (out / "recommend/searches").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "recommend/trials").glob("*.parquet")}


@pytest.fixture(scope="module")
def finished(few: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A call that was carried out whole, its page drawn, and what it printed; who goes on with it copies it."""
    out, printed = tmp_path_factory.mktemp("finished"), StringIO()
    with redirect_stdout(printed):
        assert recommend(out, drawn=True) == 0
    return out, printed.getvalue()


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "copied"))


def test_from_a_cost_to_a_placement_that_python_loads(finished: tuple[Path, str]) -> None:
    out, said = finished
    (goal,) = told(out)["goals"]
    assert all(sentence in said for sentence in goal["sentences"]) and len(goal["sentences"]) == 3
    assert goal["candidates"] == 4 and {row["label"] for row in goal["others"]} >= {"random"}
    for row in [goal["comparator"], *goal["finalists"], *goal["others"]]:
        assert row["share"] == pytest.approx(0.5, rel=0.03) and row["low"] <= row["value"] <= row["high"]

    file = out / "recommended/0.50.yaml"
    model = open_model("pairs_vit_tiny", weights=None, workload_name="embedded", classes=10).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is for this very model
        fast = reducers.reduce_tokens(model, reducers.load(file, model)).eval()
    chosen = goal["recommended"]
    confirm = part(embedded_workload(IMAGES), None).confirmation
    images = embedded_workload(IMAGES)
    right = [int(fast(images.batch(row, row + 1)).argmax()) == images.labels[row] for row in confirm]
    assert np.mean(right) == pytest.approx(chosen["value"]), "Python gives what was confirmed"
    assert main(["validate", str(file)]) == 0
    assert yaml.safe_load(file.read_text())["recommended"]["accuracy"] == pytest.approx(chosen["value"], abs=1e-6)

    page = (out / "recommend.html").read_text()
    assert goal["sentences"][0].replace("'", "&#39;") in page and "reducers.load" in page
    assert read_found(out).goals == [goal]


def test_the_same_call_again_computes_nothing_and_what_it_chose_is_reproduced(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (goal,), before = told(copied)["goals"], results(copied)
    assert recommend(copied) == 0
    assert results(copied) == before and told(copied)["goals"] == [goal], "nothing is computed or counted twice"
    assert main(["reproduce", goal["recommended"]["key"], "--out", str(copied / "recommend")]) == 0
    assert "bit for bit" in capfd.readouterr().out
    assert main(["status", "--out", str(copied / "recommend")]) == 0


@pytest.mark.parametrize("candidates", sampled([2, 1], quick=[1]))
def test_how_often_confirmation_images_were_looked_at_is_counted(
    candidates: int, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (goal,) = told(copied)["goals"]
    assert recommend(copied, "--cost", "0.5", "--seed", "1", candidates=candidates) == 0
    (again,) = told(copied)["goals"]
    assert again["seen_before"] == 1 and "seen 1 time before" in again["sentences"][2], "another search, whoever wins"
    assert recommend(copied) == 0
    assert told(copied)["goals"] == [goal], "the first was the first"

    (copied / "recommend/openings.json").write_text("[")
    capfd.readouterr()
    assert recommend(copied) == 2
    error = capfd.readouterr().err
    assert "openings.json is damaged" in error and "Traceback" not in error, "images that were seen are not called new"


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_in_the_middle_it_goes_on_without_repeating_anything(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole, cut = finished[0], tmp_path / "cut"
    looked, look = 0, Pieces.look

    def killed(self: Pieces, *given: Any) -> Any:
        nonlocal looked
        looked += 1
        if looked > after:
            raise KeyboardInterrupt
        return look(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Pieces, "look", killed)
        assert recommend(cut) == 130
    before = results(cut)
    assert before and recommend(cut) == 0
    assert journal(cut) == journal(whole) and told(cut)["goals"] == told(whole)["goals"]
    assert before.items() <= results(cut).items() and results(cut).keys() == results(whole).keys()


@pytest.mark.slow
def test_a_search_that_other_code_began_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal names results of a method as it was; they are no results of the method as it is."""
    assert recommend(tmp_path, candidates=2) == 0
    before, code = results(tmp_path), pieces.code_of

    def changed(trial: Trial) -> str:
        return code(trial) + " method=changed" if "tome" in trial.stages.text else code(trial)

    monkeypatch.setattr(pieces, "code_of", changed)
    monkeypatch.setattr(call, "code_of", changed)
    assert recommend(tmp_path, candidates=2) == 0
    fresh = results(tmp_path).keys() - before.keys()
    assert fresh and before.items() <= results(tmp_path).items()
    stages = {name: Store(tmp_path / "recommend").load(name.partition(".")[0])["reducer"] for name in fresh}
    assert all("tome" in text for text in stages.values()), "all others are as they were"


@pytest.mark.parametrize("how", ["--serial", pytest.param("--workers=1", marks=pytest.mark.slow)])
def test_what_an_earlier_run_found_on_search_images_is_read_and_nothing_of_the_others(tmp_path: Path, how: str) -> None:
    """A run over all images is in OUT. Its EViT is made perfect on the confirmation images alone: no one may see it."""
    spec = tmp_path / "few.yaml"
    spec.write_text(FEW)
    out, limit = tmp_path / "out", ["--limit", str(IMAGES)]
    assert main(["run", "--serial", "--specs", str(spec), *limit, "--out", str(out)]) == 0
    store = Store(out)
    rows = {row["variant"]: row for row in store.rows().values()}
    plant(store, rows["EViT"]["key"], set(part(embedded_workload(IMAGES), None).confirmation))
    assert recommend(out, how=how) == 0
    (goal,) = told(out)["goals"]
    assert goal["comparator"]["label"] == "top-K"
    searched = {row["label"]: row["search"] for row in goal["singles"]}
    assert searched["EViT"] == 0.0, "its rows of the search images were read"
    evit = next(row for row in goal["others"] if row["label"] == "EViT")
    assert 0 < evit["value"] < 1, "… and those of the confirmation images computed"
    names = [json.loads(row["trial"])["variant"] for row in Store(out / "recommend").rows().values()]
    assert names.count("EViT") == 1


@pytest.mark.slow
def test_results_of_another_version_in_out_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "few.yaml"
    spec.write_text(FEW)
    out = tmp_path / "out"
    assert main(["run", "--serial", "--specs", str(spec), "--limit", str(IMAGES), "--out", str(out)]) == 0
    load = Store.load

    def older(self: Store, key: str) -> dict[str, Any] | None:
        row = load(self, key)
        if row is not None and self.out == out:
            row["trial"] = json.dumps({**json.loads(row["trial"]), "a field of later": 1})
        return row

    monkeypatch.setattr(Store, "load", older)
    assert recommend(out, candidates=1) == 0, capfd.readouterr().err


@pytest.mark.slow
def test_a_search_into_an_object_store_goes_on_and_its_page_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIEVIT_CACHE", str(tmp_path))
    with local_s3() as bucket:
        asked = ["recommend", "--serial", "--limit", str(IMAGES), "--candidates", "1", "--cost", "0.5"]
        assert main([*asked, "--out", f"{bucket}/out"]) == 0
        said = capfd.readouterr().out
        assert "copy it here for reducers.load" in said and "reducers.load('s3:" not in said
        assert said.splitlines()[-1] == f"{bucket}/out/recommend.html"
        out = Store(f"{bucket}/out")
        page = out.storage.read("recommend.html").decode()
        assert "reducers.load" in page and len(out.storage.entries("figures")) == 4, "with the kept patches"
        out.delete("recommend.html")
        before = Store(f"{bucket}/out/recommend").finished()
        assert main([*asked, "--out", f"{bucket}/out"]) == 0
        assert Store(f"{bucket}/out/recommend").finished() == before
        assert out.storage.entry("recommend.html") is not None, "drawn again"
        capfd.readouterr()
        assert analysis(["--recommendation", f"{bucket}/none"]) == 2
        assert "`sievit recommend --out s3://" in capfd.readouterr().err


def plant(store: Store, key: str, good: set[int]) -> None:
    """Right on these images, wrong on all others."""
    table = store.load_images(key)
    correct = pa.array([place in good for place in range(table.num_rows)])
    place = table.schema.get_field_index("correct")
    table = table.set_column(place, table.schema.field(place), correct).cast(IMAGE_SCHEMA)
    store.storage.write(images_file(key), parquet(owned(table, key)))
    assert store.storage.entry(row_file(key)) is not None


@pytest.mark.slow
def test_confirmation_does_not_depend_on_the_order_of_costs(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert recommend(one, "--cost", "0.5 0.6", candidates=2) == 0
    assert recommend(other, "--cost", "0.6", "0.5", candidates=2) == 0
    first, second = ({goal["goal"]["name"]: goal for goal in told(out)["goals"]} for out in (one, other))
    assert first == second and set(first) == {"0.50", "0.60"}
    assert (one / "recommended/0.60.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "what may it cost"),
        (["--cost", "half"], "is no number"),
        (["--cost", "1.5"], "above 0 and below 1"),
        (["--speed", "0.5"], "above 1"),
        (["--cost", "0.5", "--candidates", "0"], "--candidates is 1 or more"),
        (["--cost", "0.5", "--limit", "60"], "60 images leave 36 to confirm on"),
        (["--cost", "0.5", "--model", "pairs_vit_tiny digits_vit_tiny"], "one model is searched for at a time"),
        (["--cost", "0.001", "--limit", "150"], "no method costs 0.001 of the dense model here"),
    ],
)
def test_what_cannot_be_answered_is_told_with_the_remedy(
    words: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", "--serial", "--out", str(tmp_path), *words]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fill"], "--host 'fill' is no option such as fill=zero"),
        (["=zero"], "is no option such as"),
        (["fill=grey"], "--host fill=grey: pairs_vit_tiny knows no options: leave it out"),
        (["fill=last", "a=b"], "--host fill=last: pairs_vit_tiny knows no options"),
    ],
)
def test_options_of_the_host_are_those_that_it_knows(
    words: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["recommend", "--serial", "--out", str(tmp_path), "--cost", "0.5", "--limit", str(IMAGES)]
    assert main([*asked, "--host", *words]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_model_is_driven_as_it_is_asked_from_the_search_to_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--cost", "0.8", "--model", "digits_cvt_tiny"]
    assert recommend(tmp_path, *words, "--host", "fill=zero", candidates=2) == 0
    rows = Store(tmp_path / "recommend").rows()
    assert rows and all(json.loads(row["trial"])["host"] == '{"fill":"zero"}' for row in rows.values())
    (goal,), before = told(tmp_path)["goals"], results(tmp_path)
    file = tmp_path / "recommended/0.80.yaml"
    model = open_model("digits_cvt_tiny", weights=None, workload_name="embedded", classes=10).model
    with pytest.warns(UserWarning, match=r"host=\{'fill': 'zero'\}"):
        placement = reducers.load(file, model)
    fast, images = reducers.reduce_tokens(model, placement, host={"fill": "zero"}).eval(), embedded_workload(IMAGES)
    confirm = part(images, None).confirmation
    right = [int(fast(images.batch(row, row + 1)).logits.argmax()) == images.labels[row] for row in confirm]
    assert np.mean(right) == pytest.approx(goal["recommended"]["value"])
    assert main(["reproduce", goal["recommended"]["key"], "--out", str(tmp_path / "recommend")]) == 0
    assert "bit for bit" in capfd.readouterr().out
    assert main(["validate", "--model", "digits_cvt_tiny", str(file)]) == 0
    assert recommend(tmp_path, *words, candidates=1) == 0
    assert before.items() <= results(tmp_path).items() and len(results(tmp_path)) > len(before), "other trials"


def test_goals_are_read_as_they_are_written() -> None:
    assert [goal.name for goal in goals_of(["0.5 0.7", "0.50"], ["1.5"])] == ["0.50", "0.70", "speed-1.50"]
    near = goals_of(["0.5", "0.504", "0.0001", "0.999"], ["1.501"])
    assert [goal.name for goal in near] == ["0.50", "0.504", "0.0001", "0.999", "speed-1.501"], "each has its own file"


@pytest.mark.slow
def test_a_speed_is_met_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status = recommend(tmp_path, "--speed", "1.1", "--batch", "64")
    error = capfd.readouterr().err
    if status == 0:
        (goal,) = told(tmp_path)["goals"]
        assert goal["recommended"]["timed"]["speedup_low"] >= 1.1
        assert (tmp_path / "recommended/speed-1.10.yaml").exists()
        searched = [event for event in journal(tmp_path)[1:] if event["event"] != "timed"]
        (timed,) = (event for event in journal(tmp_path) if event.get("event") == "timed")
        if recommend(tmp_path, "--speed", "1.1", "--batch", "64") == 0:  # timed again, a finalist may be too slow
            assert timed in journal(tmp_path), "the costs that the search began with"
            assert [event for event in journal(tmp_path)[1:] if event["event"] != "timed"] == searched
        capfd.readouterr()
    else:  # a machine with other work may be as slow as that
        assert "as fast" in error
    assert recommend(tmp_path, "--speed", "20") == 2
    assert "no method is 20 times as fast" in capfd.readouterr().err


@pytest.mark.slow
def test_features_without_labels_get_an_answer(tmp_path: Path) -> None:
    assert recommend(tmp_path, "--cost", "0.6", "--task", "embed") == 0
    found = told(tmp_path)
    assert found["metric"] == "cosine" and found["dense"]["value"] == 1
    assert all(0 < row["value"] < 1 for row in found["goals"][0]["others"])
    assert "cosine" in (tmp_path / "recommended/0.60.yaml").read_text()


@pytest.mark.slow
def test_on_ray_candidates_are_the_same_trials(tmp_path: Path) -> None:
    """Who is asked next depends on who ends first; what a candidate comes to does not."""
    serial, at_once = tmp_path / "serial", tmp_path / "at_once"
    assert recommend(serial) == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "draw_recommendation", lambda out: 0)
        asked = ["--limit", str(IMAGES), "--candidates", "4", "--workers", "2", "--out", str(at_once)]
        assert main(["recommend", "--cost", "0.5", *asked]) == 0
        before = results(at_once)
        assert main(["recommend", "--cost", "0.5", *asked]) == 0 and results(at_once) == before
    (one,), (other,) = told(serial)["goals"], told(at_once)["goals"]
    for name in ("comparator", "singles", "candidates", "search_images", "confirmation_images"):
        assert one[name] == other[name]
    rows = [{row["key"]: row for row in Store(out / "recommend").rows().values()} for out in (serial, at_once)]
    both = rows[0].keys() & rows[1].keys()
    assert len(both) >= 8
    for key in both:
        for column in ("top1", "gmacs_mean", "reducer", "tokens"):
            assert rows[0][key][column] == rows[1][key][column]
