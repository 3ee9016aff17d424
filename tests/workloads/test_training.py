"""Training images: drawn or found once, never those that are evaluated, and the same wherever a training goes on."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ablations.models.digits import normalise
from ablations.workloads import digits, pairs
from ablations.workloads.base import WorkloadError
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.photographs import Photographs, seeded
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.reading import ImageSource
from ablations.workloads.training import Scenes, TrainingAccess, drawn_scenes, shifted, training_root
from tests.workloads.conftest import WNIDS, MakeTree


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("workload", "render"), [("embedded", pairs.render), ("embedded:v1", digits.render)])
def test_scenes_are_of_the_train_split_and_drawn_once(
    cache: Path, workload: str, render: Callable[..., digits.Scene]
) -> None:
    scenes = Scenes(cache, count=6, augment="none", holdout=3, seed=0, workload=workload)
    image, label = scenes[0, 4]
    wanted = render("train", 4, seed=1)
    assert label == wanted.label and torch.equal(image, normalise(torch.from_numpy(wanted.image)[None])[0])
    assert scenes.held_out is not None and len(scenes) == 6 and len(scenes.held_out) == 3
    assert np.array_equal(scenes.held_out.pixels[0, :, :, 0], render("train", 6, seed=1).image)
    files = {path: path.stat().st_mtime_ns for path in (cache / "training").glob("*.npy")}
    Scenes(cache, count=6, augment="none", holdout=3, seed=0, workload=workload)
    assert files == {path: path.stat().st_mtime_ns for path in (cache / "training").glob("*.npy")}


def test_a_damaged_file_of_scenes_is_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels, labels = drawn_scenes(tmp_path, 0, 3)
    before = np.array(pixels), labels.copy()
    (path,) = (tmp_path / "training").glob("*0-3.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    for damaged in (b"damaged", content):
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            pixels, labels = drawn_scenes(tmp_path, 0, 3)
    assert "damaged" in caplog.text and "not what was drawn" in caplog.text
    assert np.array_equal(pixels, before[0]) and np.array_equal(labels, before[1])


def test_a_shift_moves_over_black_ground_and_depends_on_its_place_alone(cache: Path) -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3)
    assert shifted(image, 1, -1).tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert np.array_equal(shifted(image, 0, 0), image)
    scenes = Scenes(cache, count=6, augment="light", holdout=0, seed=0)
    first = [scenes[0, index][0] for index in range(6)]
    again = [scenes[0, index][0] for index in reversed(range(6))][::-1]
    assert all(map(torch.equal, first, again))
    assert any(not torch.equal(scenes[1, index][0], first[index]) for index in range(6))


def test_digits_are_not_augmented_like_photographs(cache: Path) -> None:
    with pytest.raises(WorkloadError, match="use 'light' or 'none'"):
        Scenes(cache, count=2, augment="strong", holdout=0, seed=0)
    with pytest.raises(WorkloadError, match="leave --train-data out"):
        TrainingAccess(ImageSource(train_data="x"), "digits_vit_tiny", cache).open(augment="light", holdout=0, seed=0)


def test_the_training_folder_lies_beside_the_evaluated_one(make_tree: MakeTree, tmp_path: Path) -> None:
    make_tree(name="data/val")
    train = make_tree(name="data/train")
    for data in (tmp_path / "data", tmp_path / "data" / "val"):
        assert training_root(str(data), None, workload="imagefolder") == train
    other = make_tree(name="elsewhere")
    assert training_root(str(tmp_path / "data"), str(other), workload="imagefolder") == other
    assert training_root(None, str(other), workload="torchvision:CIFAR10") == other


def test_evaluated_images_are_never_trained_on(make_tree: MakeTree, tmp_path: Path) -> None:
    alone = make_tree(name="alone")
    with pytest.raises(WorkloadError, match="no training images beside .* --train-data"):
        training_root(str(alone), None, workload="imagefolder")
    for same in (alone, tmp_path, alone / WNIDS[0]):
        with pytest.raises(WorkloadError, match="overlap"):
            training_root(str(alone), str(same), workload="imagefolder")
    with pytest.raises(WorkloadError, match="name their folder with --train-data"):
        training_root("x", None, workload="timm:folder")
    with pytest.raises(WorkloadError, match="is no folder"):
        training_root(str(alone), str(tmp_path / "none"), workload="imagefolder")


@pytest.mark.parametrize("augment", ["none", "light", "strong"])
def test_photographs_are_augmented_by_their_place_alone(
    augment: str, make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path
) -> None:
    images = Photographs(
        make_tree(count=5), head=1000, preprocess=preprocess, cache=tmp_path, augment=augment, holdout=1, seed=0  # type: ignore[arg-type]
    )  # fmt: skip
    assert len(images) == 14 and images.held_out is not None and len(images.held_out) == 1
    assert not {entry[0] for entry in images.entries} & set(images.held_out.ids)
    random.seed(1)
    first = images[0, 3]
    drawn = random.random(), torch.rand(1), np.random.rand()
    random.seed(2)
    torch.manual_seed(2)
    again = images[0, 3]
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert first[0].shape == (3, 32, 32) and first[0].dtype == torch.float32
    assert torch.equal(images[1, 3][0], first[0]) is (augment == "none")
    assert drawn != (random.random(), torch.rand(1), np.random.rand())


def test_photographs_are_the_same_from_loading_processes(
    make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path
) -> None:
    images = Photographs(
        make_tree(), head=1000, preprocess=preprocess, cache=tmp_path, augment="strong", holdout=0, seed=0
    )
    places = [[(0, index) for index in range(start, start + 3)] for start in (0, 3, 6)]
    here, there = (list(DataLoader(images, batch_sampler=places, num_workers=count)) for count in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_photograph_that_cannot_be_read_is_replaced_by_the_next(
    make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_tree()
    images = Photographs(root, head=1000, preprocess=preprocess, cache=tmp_path, augment="none", holdout=0, seed=0)
    images.entries[0][2].write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(images[0, 0][0], images[0, 1][0])
    assert "the next image takes its place" in caplog.text


def test_a_class_folder_means_the_same_class_in_both_sets(
    make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path
) -> None:
    evaluated = open_image_folder(
        str(make_tree(("ants", "bees", "cats"), name="evaluated")),
        head=None, preprocess=preprocess, limit=None, strict=True, cache=None,
    )  # fmt: skip
    root = make_tree(("bees", "cats", "dogs"), name="trained")
    with pytest.raises(WorkloadError, match="the class 'bees' is number 1 among the evaluated images and 0"):
        Photographs(
            root, head=3, preprocess=preprocess, cache=tmp_path, augment="none", holdout=0, seed=0, evaluated=evaluated
        )


def test_seeding_puts_the_generators_back() -> None:
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()
    with seeded(5):
        random.random(), torch.rand(1)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
