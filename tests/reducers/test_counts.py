"""Counts: one value for images alike and for each its own, and the layout that it leaves."""

from __future__ import annotations

import pytest
import torch

from reducers import Count, Drop, Layout, Ratio, State
from reducers.kit.selection import at_most, keep_count
from reducers.tokens import Counts

ALIKE = Layout.alike(3, 10, 2, torch.device("cpu"))
RAGGED = Layout.ragged(torch.tensor([10, 3, 0, 10]), torch.tensor([1, 1, 0, 1]))
STATE = State(0, 4, 36)


@pytest.mark.parametrize("rounding", ["floor", "ceil", "nearest"])
@pytest.mark.parametrize(
    "budget", [Ratio(0.7), Ratio(0.3, of="initial"), Ratio(0.5, count_prefix=True), Count(4), Drop(3)]
)
def test_a_budget_counts_as_it_resolves(budget, rounding):
    for layout in (ALIKE, RAGGED):
        counts = keep_count(layout, budget, STATE, rounding)
        resolved = budget.resolve(layout.patches, initial=36, prefix=layout.prefix, rounding=rounding)
        assert torch.equal(counts.each, resolved) and counts.each.dtype == torch.int64
        assert counts.on_host == resolved.tolist() and counts.most == max(counts.on_host)


def test_images_alike_have_one_number_and_others_have_none():
    assert at_most(ALIKE, 5).alike == 5 and at_most(RAGGED, 5).alike is None
    assert at_most(RAGGED, 5).on_host == [5, 2, 0, 5] and at_most(ALIKE, 50).on_host == [8, 8, 8]
    one = Layout.ragged(torch.tensor([7]), torch.tensor([1]))
    assert at_most(one, 5).alike == 5, "one image is alike to itself"


def test_what_a_rule_says_is_asked_for_each_kind_of_image_once():
    asked = []
    Counts.by(RAGGED, lambda patches, prefix: asked.append((patches, prefix)) or 1)
    assert sorted(asked) == [(0, 0), (2, 1), (9, 1)]


def test_all_stay_and_who_has_work_to_do():
    assert at_most(ALIKE, 8).keep_all and not at_most(ALIKE, 7).keep_all
    assert at_most(RAGGED, 9).keep_all and not at_most(RAGGED, 8).keep_all
    assert at_most(RAGGED, 5).busy.tolist() == [1, 0, 0, 1] and at_most(ALIKE, 8).busy.tolist() == [0, 0, 0]
    measured = Counts.of(RAGGED, torch.tensor([9, 2, 0, 3]))
    assert not measured.keep_all and not measured.known and measured.busy.tolist() == [0, 0, 0, 1]


def test_what_goes_and_what_is_left_add_up():
    assert at_most(ALIKE, 5).left.alike == 3
    assert at_most(RAGGED, 5).left.on_host == [4, 0, 0, 4]
    assert Counts.of(RAGGED, torch.tensor([1, 2, 0, 3])).left.each.tolist() == [8, 0, 0, 6]


@pytest.mark.parametrize("measured", [False, True])
def test_a_layout_that_is_left_is_the_one_that_would_be_read_from_the_device(measured):
    counts = at_most(RAGGED, 5)
    if measured:
        counts = Counts.of(RAGGED, counts.each)
    left, read = RAGGED.leaving(counts), Layout.ragged(torch.tensor([6, 3, 0, 6]), RAGGED.prefix)
    assert torch.equal(left.lengths, read.lengths) and torch.equal(left.prefix, read.prefix)
    assert (left.rows, left.uniform, left.on_host) == (read.rows, read.uniform, read.on_host)


def test_images_alike_stay_alike():
    left = ALIKE.leaving(at_most(ALIKE, 5))
    assert left.uniform == (7, 2) and left.rows == 21 and left.lengths.tolist() == [7, 7, 7]
    own = ALIKE.leaving(Counts.of(ALIKE, torch.tensor([5, 4, 5])))
    assert own.uniform is None and own.on_host == ([7, 6, 7], [2, 2, 2])


def test_counts_of_a_rule_are_made_without_reading_a_tensor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "tolist", lambda *_: pytest.fail("reads from the device"))
    monkeypatch.setattr(torch.Tensor, "item", lambda *_: pytest.fail("reads from the device"))
    for layout in (ALIKE, RAGGED):
        counts = keep_count(layout, Ratio(0.5), STATE, "floor")
        assert not counts.keep_all and layout.leaving(counts).rows == sum(counts.on_host) + sum(
            prefix for _, prefix in layout.kind_of_each
        )
