"""The page of a recommendation, from whole and from damaged records."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.frame import AnalysisError
from analysis.recommendation import write_recommendation

pytestmark = pytest.mark.usefixtures("plain_figures")
STAGES = [{"at": [3], "stack": [{"name": "topk", "budget": {"count": 30}}]}]


def row(label: str, value: float, **more: Any) -> dict[str, Any]:
    return {"label": label, "control": False, "stages": STAGES, "key": f"{len(label):016x}", "search": value,
            "value": value, "low": value - 0.1, "high": value + 0.1, "gmacs": 1.0, "share": 0.5, **more}  # fmt: skip


def record(label: str = "ToMe", costs: tuple[float, ...] = (0.5,)) -> dict[str, Any]:
    difference = {"mean": 0.1, "low": 0.05, "high": 0.15, "p": 0.01, "adjusted": 0.01, "better": True, "worse": False}
    goals = [
        {"goal": {"name": f"{share:.2f}", "share": share, "speed": None}, "recommended": row(label, 0.8),
         "comparator": row("top-K", 0.7), "finalists": [row(label, 0.8, difference=difference)],
         "others": [row("random, a control", 0.4, control=True)], "sentences": [f"use {label}", "b", "c"], "tests": 1,
         "singles": [{"label": "top-K", "search": 0.7}], "complete": [{"label": label, "search": 0.8}],
         "left_out": [["EViT", "its steps"]], "confirmation_images": 90, "search_images": 60}
        for share in costs
    ]  # fmt: skip
    return {"format": 1, "version": "0", "model": "m", "workload": "w", "weights": "hub", "source": "timm",
            "task": "classify", "metric": "accuracy", "dense": {"gmacs": 1.0, "search": 0.9, "value": 0.9}, "seed": 0,
            "goals": goals}  # fmt: skip


def written(folder: Path, told: Any) -> str:
    (folder / "recommend.json").write_text(json.dumps(told))
    return write_recommendation(folder).read_text(encoding="utf-8")


def test_words_of_a_record_are_no_markup(tmp_path: Path) -> None:
    text = written(tmp_path, record("<script>alert(1)</script> a$b$"))
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({}, 'model = timm.create_model("m", pretrained=True).eval()'),
        ({"weights": "file"}, 'model = open_model("m", weights="FILE.safetensors", workload_name="w").model'),
        ({"model": "m?img=160"}, 'model = open_model("m?img=160", weights=None, workload_name="w").model'),
        (
            {"model": "hf:m", "source": "transformers", "task": "embed"},
            'weights=None, workload_name="w", headless=True)',
        ),
    ],
)
def test_the_lines_of_python_open_the_model_that_was_searched(about: dict[str, str], line: str, tmp_path: Path) -> None:
    text = html.unescape(written(tmp_path, {**record(), **about}))
    assert line in text and ("import timm" in text) is (about == {}) and "at the cost of 0.50" in text


def test_several_costs_get_a_front(tmp_path: Path) -> None:
    text = written(tmp_path, record(costs=(0.4, 0.5)))
    assert "Over the costs" in text and "recommended/0.40.yaml" in text and "recommended/0.50.yaml" in text


def lacking(told: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The record without each of its values in turn, down to those of a row."""

    def paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield (*path, name)
            if "stages" not in path:
                yield from paths(value[name], (*path, name))

    for path in paths(told, ()):
        one = copy.deepcopy(told)
        place: Any = one
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]
        yield "/".join(map(str, path)), one


@pytest.mark.slow
def test_a_damaged_record_is_drawn_or_told_and_never_ends_in_a_traceback(tmp_path: Path) -> None:
    refused = dict[str, str]()
    for path, told in lacking(record()):
        try:
            written(tmp_path, told)
        except AnalysisError as error:
            refused[path] = str(error)
    assert {"goals", "goals/0", "dense", "metric", "goals/0/tests", "goals/0/comparator/low"} <= refused.keys()
    assert all("run `sievit recommend` again" in said for said in refused.values())


@pytest.mark.parametrize(
    "told", [[], {}, 7, {**record(), "format": 2}, {**record(), "goals": 3}, {**record(), "dense": {}}]
)
def test_what_is_no_record_of_this_version_is_one_message(
    told: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recommend.json").write_text(json.dumps(told))
    assert main(["--recommendation", str(tmp_path)]) == 2
    assert "recommend.json" in (error := capsys.readouterr().err) and "Traceback" not in error
