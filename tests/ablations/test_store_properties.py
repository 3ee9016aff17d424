"""Whatever a trial finds: what is saved is read back to the last bit, in any order, and a failure is never lost."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.store.store import Store
from ablations.trial.stages import Stages
from ablations.trial.target import Target
from ablations.trial.trial import Trial, TrialResult, base_row, failed

IMAGES = 5
reals = st.floats(allow_nan=False) | st.sampled_from([5e-324, -0.0, 0.1 + 0.2, 1 - 2**-53])
wholes = st.integers(-(2**63), 2**63 - 1)
words = st.text(max_size=20)
METRICS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("top1", "top1_low", "gmacs_mean", "coverage", "seconds", "images_per_second"), st.none() | reals),
    **dict.fromkeys(("tokens", "tokens_std"), st.none() | st.lists(reals, max_size=13)),
    **dict.fromkeys(("measured_batch", "epochs", "train_images", "probes"), st.none() | wholes),
    **dict.fromkeys(("device", "versions", "score", "budget", "target_note"), st.none() | words),
    **dict.fromkeys(("calibrated", "target_reached", "shared_prefix", "teacher"), st.none() | st.booleans()),
}
COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "image": words, "label": wholes, "prediction": wholes, "correct": st.booleans(), "loss": reals,
    "tokens": st.lists(wholes, max_size=4), "kept": st.lists(st.binary(max_size=25), max_size=4),
    "coverage": st.none() | reals, "clutter": st.none() | wholes,
}  # fmt: skip
folders = itertools.count()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


def new_store(base: Path) -> Store:
    """A store of its own for each example."""
    return Store(base / str(next(folders))).create()


def trial_of(target: Target, **changes: Any) -> Trial:
    blank = Trial(
        spec="tiny", variant="ATS", x=1.0, stages=Stages('[{"at":[3],"stack":[{"budget":{"count":9},"name":"ats"}]}]'),
        model=target.facts.name, weights="random", weights_digest="w", workload="embedded", data_digest="d",
        images=IMAGES, batch=4, seed=0,
    )  # fmt: skip
    return dataclasses.replace(blank, **changes)


@st.composite
def results(draw: st.DrawFn, target: Target) -> TrialResult:
    trial = trial_of(target, seed=draw(st.integers(0, 2**31)), variant=draw(words), spec=draw(words))
    row = {**base_row(trial, target.facts), "status": "ok", **{name: draw(value) for name, value in METRICS.items()}}
    columns = {name: draw(st.lists(value, min_size=IMAGES, max_size=IMAGES)) for name, value in COLUMNS.items()}
    return TrialResult(row, columns)


def identical(one: Any, other: Any) -> bool:
    """Equal to the last bit: 0.0 is not -0.0."""
    if isinstance(one, float) and isinstance(other, float):
        return math.copysign(1, one) == math.copysign(1, other) and one == other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(identical, one, other))
    return type(one) is type(other) and one == other


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_result_is_read_back_to_the_last_bit(base: Path, target: Target, data: st.DataObject) -> None:
    store, result = new_store(base), data.draw(results(target))
    store.save(result)
    row = store.load(result.key)
    assert row is not None
    assert {name: (value, row[name]) for name, value in result.row.items() if not identical(value, row[name])} == {}
    images = pq.read_table(store.out / "images" / f"{result.key}.parquet").to_pydict()
    for name, column in result.images.items():
        assert identical(images[name], list(column)), name
    assert store.finished() == {result.key} == set(store.rows())


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_the_order_of_saving_leaves_no_trace(base: Path, target: Target, data: st.DataObject) -> None:
    found = {result.key: result for result in data.draw(st.lists(results(target), min_size=1, max_size=5))}
    orders = [list(found), data.draw(st.permutations(list(found)))]
    stores = [new_store(base) for _ in orders]
    for store, order in zip(stores, orders, strict=True):
        for key in order:
            store.save(found[key])
        assert store.compact(sorted(found)) == len(found)
    one, other = (pq.read_table(store.results) for store in stores)
    assert one.equals(other) and one["key"].to_pylist() == sorted(found)
    assert stores[0].finished() == stores[1].finished() == set(found)


@settings(deadline=None, max_examples=20)
@given(reason=st.text(st.characters(codec=None), max_size=40), seed=st.integers(0, 2**31))
def test_a_failure_is_kept_whatever_its_reason_is_written_in(
    base: Path, target: Target, reason: str, seed: int
) -> None:
    """File names that are no UTF-8 reach messages as lone surrogates, which no file of text can hold."""
    store, trial = new_store(base), trial_of(target, seed=seed)
    store.save(failed(trial, target.facts, OSError(reason)))
    row = store.load(trial.key)
    assert row is not None
    assert row["status"] == "failed" and row["error"].startswith("OSError") and store.finished() == set()
    plain = reason.isprintable() and reason.isascii()
    assert not plain or reason in row["error"]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_result_with_any_byte_wrong_is_read_whole_or_not_at_all(
    base: Path, target: Target, data: st.DataObject
) -> None:
    """Nothing but the row that was written ever comes back from a file that was damaged."""
    store = new_store(base)
    trial = trial_of(target)
    store.save(TrialResult({**base_row(trial, target.facts), "status": "ok", "top1": 0.5}, {"image": ["a"] * IMAGES}))
    written = store.load(trial.key)
    path = store.out / "trials" / f"{trial.key}.parquet"
    content = bytearray(path.read_bytes())
    cut = data.draw(st.booleans())
    place = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))  # times in it make its length vary
    if cut:
        content = content[:place]
    else:
        content[place : place + 4] = data.draw(st.binary(min_size=1, max_size=4))
    path.write_bytes(bytes(content))
    fresh = Store(store.out)
    row = fresh.load(trial.key)
    assert row is None or row == written
    assert fresh.finished() in (set(), {trial.key})


def test_a_result_whose_column_got_another_name_is_not_read(base: Path, target: Target) -> None:
    """Checksums cover the pages of a file, not the names in its end."""
    store, trial = new_store(base), trial_of(target)
    other = dataclasses.replace(trial, x=2.0)
    for one in (trial, other):
        row = {**base_row(one, target.facts), "status": "ok", "top1": 0.5, "images": IMAGES}
        store.save(TrialResult(row, {"image": ["a"] * IMAGES}))
    assert Store(store.out).finished() == {trial.key, other.key}
    path = store.out / "trials" / f"{trial.key}.parquet"
    path.write_bytes(path.read_bytes().replace(b"data_digest", b"data_digesu"))
    assert Store(store.out).load(trial.key) is None, "by itself"
    assert Store(store.out).finished() == {other.key}, "nor among others"


@given(st.data())
def test_a_key_changes_with_every_field_and_with_nothing_else(target: Target, data: st.DataObject) -> None:
    trial = trial_of(target)
    strings = [field.name for field in dataclasses.fields(Trial) if isinstance(getattr(trial, field.name), str)]
    name = data.draw(st.sampled_from(strings))
    value = data.draw(words)
    changed = dataclasses.replace(trial, **{name: value})
    assert (changed.key == trial.key) == (value == getattr(trial, name))
    assert dataclasses.replace(changed, **{name: getattr(trial, name)}).key == trial.key
