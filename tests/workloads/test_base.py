"""The Workload value, its digest and the choice of a subset."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablations.workloads import split_calibration as split
from ablations.workloads.base import (
    Workload,
    WorkloadError,
    data_digest,
    pixel_digest,
    refuse_or_keep,
    split_calibration,
    spread_subset,
    subset,
)
from ablations.workloads.embedded import embedded_workload


def workload(channels: int = 3) -> Workload:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, channels), dtype=np.uint8)
    labels = np.array([0, 1, 2, 1], dtype=np.int64)
    return Workload(
        name="test",
        pixels=pixels,
        labels=labels,
        ids=("a", "b", "c", "d"),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        classes=3,
        digest="-",
    )


def test_a_batch_is_normalised_channel_by_channel() -> None:
    images = workload()
    batch = images.batch(1, 3)
    assert batch.shape == (2, 3, 6, 5) and batch.dtype == torch.float32 and batch.is_contiguous()
    expected = (images.pixels[1:3].astype(np.float64) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(batch.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_a_batch_past_the_end_holds_what_is_left() -> None:
    assert len(workload().batch(3, 100)) == 1


def test_a_batch_does_not_share_memory_with_the_pixels() -> None:
    images = workload()
    images.pixels.setflags(write=False)
    before = images.pixels.copy()
    images.batch(0, 4).zero_()
    np.testing.assert_array_equal(images.pixels, before)


def test_a_grey_thumbnail_has_three_equal_channels() -> None:
    thumbnail = workload(channels=1).thumbnail(2)
    assert thumbnail.shape == (6, 5, 3) and thumbnail.dtype == np.uint8
    assert (thumbnail == thumbnail[..., :1]).all()


def test_an_empty_workload_is_refused() -> None:
    with pytest.raises(WorkloadError, match="no image"):
        dataclasses.replace(workload(), ids=())


def test_pixels_that_are_not_bytes_are_refused() -> None:
    images = workload()
    with pytest.raises(WorkloadError, match="uint8"):
        dataclasses.replace(images, pixels=images.pixels.astype(np.float32))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_head_is_refused(label: int) -> None:
    with pytest.raises(WorkloadError, match=r"0\.\.2"):
        dataclasses.replace(workload(), labels=np.array([0, 1, 2, label]))


def test_the_digest_changes_with_everything_that_can_change_a_result() -> None:
    images = workload()
    content = {"labels": images.labels, "ids": images.ids, "mean": images.mean, "std": images.std}
    changed_pixels = images.pixels.copy()
    changed_pixels[3, 5, 4, 2] ^= 1
    digests = {
        data_digest(images.pixels, **content),
        data_digest(changed_pixels, **content),
        data_digest(images.pixels.reshape(4, 5, 6, 3), **content),
        data_digest(images.pixels, **{**content, "labels": np.array([0, 1, 2, 0])}),
        data_digest(images.pixels, **{**content, "ids": ("a", "b", "c", "e")}),
        data_digest(images.pixels, **{**content, "mean": (0.5, 0.5, 0.4)}),
        data_digest(images.pixels, **{**content, "std": (0.25, 0.25, 0.2)}),
    }
    assert len(digests) == 7
    known = pixel_digest(images.pixels)
    assert data_digest(images.pixels, **content, pixels_sha256=known) == data_digest(images.pixels, **content)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 45),
    st.randoms(use_true_random=False),
)
def test_a_subset_is_spread_nested_and_independent_of_the_order(labels: list[int], limit: int, random) -> None:
    ids = [f"image {position}" for position in range(len(labels))]
    chosen = spread_subset(ids, labels, limit)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(limit, len(ids))
    assert set(spread_subset(ids, labels, max(1, limit - 1))) <= set(chosen)

    available = np.bincount(labels)
    taken = np.bincount([labels[position] for position in chosen], minlength=len(available))
    for cls, count in enumerate(taken):  # a class gives less than another only when it has no more to give
        assert count == available[cls] or count >= taken.max() - 1

    shuffled = list(range(len(ids)))
    random.shuffle(shuffled)
    again = spread_subset([ids[i] for i in shuffled], [labels[i] for i in shuffled], limit)
    names = {ids[position] for position in chosen}
    other = {ids[shuffled[position]] for position in again}
    # equal classes are dealt in the order of their hashes, so the names alone decide
    assert names == other


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_leaves_nothing_is_refused(limit: int) -> None:
    with pytest.raises(WorkloadError, match="LIMIT 1 or more"):
        spread_subset(["a"], [0], limit)


def test_strict_lists_what_cannot_be_read_and_how_many_more() -> None:
    skipped = [(f"{number}.png", "truncated") for number in range(7)]
    assert refuse_or_keep(skipped, strict=False, name="data") == tuple(skipped)
    with pytest.raises(WorkloadError, match=r"7 image\(s\).*4\.png: truncated; and 2 more.*--strict"):
        refuse_or_keep(skipped, strict=True, name="data")


def many(count: int) -> Workload:
    return dataclasses.replace(
        workload(),
        pixels=np.arange(count * 12, dtype=np.uint32).astype(np.uint8).reshape(count, 2, 2, 3),
        labels=np.arange(count, dtype=np.int64) % 3,
        ids=tuple(f"class/{index}" for index in range(count)),
        masks=np.zeros((count, 2, 2), dtype=bool),
        clutter=np.arange(count, dtype=np.int64),
    )


@pytest.mark.parametrize(("total", "calibrating"), [(928, 128), (512, 128), (511, 127), (40, 10), (4, 1), (2, 1)])
def test_a_workload_is_split_into_images_to_calibrate_on_and_to_evaluate(total: int, calibrating: int) -> None:
    whole = many(total)
    calibration, evaluated = split_calibration(whole)
    assert (len(calibration), len(evaluated)) == (calibrating, total - calibrating)
    assert not set(calibration.ids) & set(evaluated.ids)
    assert {*calibration.ids, *evaluated.ids} == set(whole.ids)
    assert len({whole.digest, calibration.digest, evaluated.digest}) == 3


def test_a_split_depends_on_the_names_alone() -> None:
    whole = many(60)
    calibration, _ = split_calibration(whole)
    order = np.random.default_rng(1).permutation(60).tolist()
    shuffled, rest = split_calibration(subset(whole, order))
    assert set(shuffled.ids) == set(calibration.ids)
    assert list(rest.ids) == [whole.ids[i] for i in order if whole.ids[i] not in set(shuffled.ids)], "order is kept"
    relabelled = dataclasses.replace(whole, labels=np.zeros(60, dtype=np.int64))
    assert split_calibration(relabelled)[0].ids == calibration.ids


def test_a_subset_carries_everything_of_its_images() -> None:
    whole = many(9)
    part = subset(whole, [7, 2])
    assert part.ids == ("class/7", "class/2") and part.labels.tolist() == [1, 2]
    np.testing.assert_array_equal(part.pixels, whole.pixels[[7, 2]])
    assert part.clutter is not None and part.clutter.tolist() == [7, 2] and part.masks is not None
    assert part.digest == data_digest(part.pixels, labels=part.labels, ids=part.ids, mean=part.mean, std=part.std)


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(WorkloadError, match="two or more"):
        split_calibration(many(1))


def test_scenes_are_evaluated_whole_and_others_calibrate() -> None:
    whole = embedded_workload(limit=6)
    calibration, evaluated = split(whole)
    assert evaluated is whole and len(calibration) == 128
    assert calibration.ids[0] == "pairs/6" and not set(calibration.ids) & set(whole.ids)
    np.testing.assert_array_equal(calibration.pixels[0], embedded_workload(limit=7).pixels[6])
    general, rest = split(many(40))
    assert (len(general), len(rest)) == (10, 30)
