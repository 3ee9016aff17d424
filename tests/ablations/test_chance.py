"""A plain model that knows nothing of the images is said loudly, and tiny sets do not cry wolf."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ablations.measure.chance import chance_of
from ablations.measure.context import DensePredictions
from ablations.workloads import Workload
from analysis.caveats import caveats
from analysis.frame import read_results
from analysis.questions import question_of


def asked(labels: np.ndarray, predictions: np.ndarray, classes: int) -> bool:
    """Whether these answers are at chance level."""
    count = len(labels)
    pixels, names = np.zeros((count, 1, 1, 1), dtype=np.uint8), tuple(map(str, range(count)))
    workload = Workload("w", pixels, labels, names, (0.0,), (1.0,), classes, "")
    dense = DensePredictions({"prediction": predictions, "correct": predictions == labels}, 1.0)
    return chance_of(dense, workload).at_chance


@pytest.mark.parametrize(("count", "classes"), [(80, 1000), (500, 1000), (50_000, 1000), (400, 10), (1000, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_that_have_nothing_to_do_with_the_labels_are_at_chance(count: int, classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    assert asked(labels, generator.permutation(labels), classes) or count == 80
    assert asked(labels, (labels + 1) % classes, classes)
    assert not asked(labels, np.where(generator.random(count) < 0.3, labels, (labels + 1) % classes), classes) or (
        classes == 2
    )


@pytest.mark.parametrize(("count", "classes"), [(1, 1000), (9, 1000), (40, 1000), (8, 2), (60, 10)])
def test_too_few_images_say_nothing(count: int, classes: int) -> None:
    labels = np.arange(count) % classes
    assert not asked(labels, np.zeros_like(labels), classes), "one in as many is right"
    assert not asked(labels, (labels + 1) % classes, classes) or classes < 1000


def test_the_numbering_of_text_order_is_at_chance_though_a_few_labels_fit() -> None:
    """A model that is always right, and a thousand folders counted in the order of their names as text."""
    order = sorted(range(1000), key=str)
    truth = np.arange(20_000) % 1000
    labels = np.argsort(order)[truth]
    assert (labels == truth).any()
    assert asked(labels, truth, 1000)


def test_a_model_that_always_answers_the_same_is_at_chance_however_uneven_the_classes() -> None:
    labels = (np.arange(2000) % 10 == 0).astype(np.int64)  # nine in ten are of class 0
    assert asked(labels, np.zeros(2000, dtype=np.int64), 2)
    assert not asked(labels, np.where(np.arange(2000) % 20 == 0, labels, 0), 2), "it finds half of the others"


def test_a_model_that_is_right_about_a_single_class_is_not() -> None:
    labels = np.zeros(500, dtype=np.int64)
    assert not asked(labels, labels.copy(), 1000)
    assert asked(labels, labels + 7, 1000)


def test_a_run_says_so_before_any_trial_and_its_record_and_report_keep_it(
    ablate: Callable[..., int], spec_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec_path.write_text(spec_path.read_text().partition("  - {variant: top-K")[0].replace("[48, 96]", "[48]"))
    for again in (False, True):  # then everything is finished, and the record must keep it
        assert ablate("run", "--specs", spec_path, "--limit", "400", "--batch", "200") == 0
        said = [record.message for record in caplog.records if "at chance level" in record.message]
        assert len(said) == 1 and "its weights are random" in said[0]
        run = json.loads((tmp_path / "out" / "run.json").read_text())
        plain = run["models"][0]["plain"]
        assert plain["at_chance"] is True and plain["images"] == run["images"] == 400, again
    assert run["settings"]["labels"] is None and run["settings"]["links"] is True
    results = read_results(tmp_path / "out")
    (setting,) = results.settings()
    told = caveats(question_of("ranking"), setting, results.of(setting), results.run)
    assert told[0].startswith("The dense model itself is at chance level here")
    assert caveats(question_of("ranking"), setting, results.of(setting), {**results.run, "models": None}) == told[1:]
