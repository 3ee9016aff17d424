"""Tasks: what is asked of a model, and by which test two answers are told apart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from ablations.records.columns import IMAGE, ROW
from ablations.records.paired import mcnemar, mcnemar_greater
from ablations.records.wilson import wilson
from ablations.tasks import Task, TaskError, task_of, tasks

EVERY = list(tasks().values())


def test_a_task_is_found_by_its_name_and_another_is_refused() -> None:
    assert {name: task.name for name, task in tasks().items()} == {name: name for name in tasks()}
    with pytest.raises(TaskError, match=r"unknown task 'clasify': did you mean classify\? choose classify"):
        task_of("clasify")
    with pytest.raises(TaskError, match="unknown task 'base'"):
        task_of("base")


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_what_a_task_names_is_a_column_of_the_results(task: Task) -> None:
    assert {task.column, f"{task.column}_low", f"{task.column}_high"} <= set(ROW) and task.value in IMAGE


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_a_paired_test_wants_the_same_images(task: Task) -> None:
    shape = (2,) * (task.dimensions - 1)  # of an image's values
    wrong = np.ones((2, 2)[: 3 - task.dimensions])
    ones = [np.ones((count, *shape)) for count in (3, 4, 0)]
    for first, second in ((ones[0], ones[1]), (ones[2], ones[2]), (wrong, wrong)):
        with pytest.raises(ValueError, match="same images"):
            task.better(first, second)


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_better_sees_who_is_ahead(task: Task) -> None:
    first, second = np.repeat([1.0, 0.0, 1.0], [20, 3, 40]), np.repeat([0.0, 1.0, 1.0], [20, 3, 40])
    if task.dimensions == 2:  # intersections and unions of one class
        first, second = (np.stack([each, np.ones(63)], axis=1) for each in (first, second))
    ahead, behind = task.better(first, second), task.better(second, first)
    assert ahead < 0.001 < 0.999 < behind <= 1
    assert task.better(first, first) == 1


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 1), (5, 5), (20, 9), (9, 20), (300, 250)])
def test_mcnemar_one_sided_is_the_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second, alternative="greater").pvalue if first + second else 1.0
    assert mcnemar_greater(first, second) == pytest.approx(expected, rel=1e-12)
    ahead = min(mcnemar_greater(first, second), mcnemar_greater(second, first))
    assert mcnemar(first, second)[0] == pytest.approx(min(1.0, 2 * ahead), rel=1e-15)


def test_classify_counts_the_images_on_which_two_disagree() -> None:
    classify = task_of("classify")
    images = {"correct": np.array([True, True, False, True]), "label": np.zeros(4)}
    first, second = classify.values(images), np.array([True, False, False, False])
    assert classify.better(first, second) == 0.25 and classify.better(second, first) == 1
    assert classify.interval(first) == wilson(3, 4)
    assert (classify.metric, classify.column, classify.higher_is_better) == ("accuracy", "top1", True)
