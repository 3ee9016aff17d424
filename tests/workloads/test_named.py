"""Data sets by name, as far as they need no network."""

from __future__ import annotations

import bz2
import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torchvision
from PIL import Image

from ablations.workloads.base import Workload, WorkloadError
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.named import open_named
from ablations.workloads.preprocess import Preprocess
from tests.workloads.conftest import WNID_INDICES, WNIDS, MakeTree


@pytest.fixture
def open_set(preprocess: Preprocess):
    """``open_named`` with the defaults of a run; each can be overridden."""

    def open_with(name: str, data: Path | None = None, **changes) -> Workload:
        options = {"head": 10, "preprocess": preprocess, "limit": None, "strict": False, "cache": None}
        return open_named(name, data=None if data is None else str(data), **{**options, **changes})

    return open_with


def test_a_torchvision_data_set_becomes_a_workload(open_set, preprocess: Preprocess) -> None:
    images = open_set("torchvision:FakeData", limit=12)
    assert len(images) == 12 and images.classes == 10 and images.pixels.shape == (12, 32, 32, 3)
    fake = torchvision.datasets.FakeData()
    position = int(images.ids[5])
    image, label = fake[position]
    assert images.labels[5] == label
    np.testing.assert_array_equal(images.pixels[5], preprocess(image))


def test_a_named_data_set_is_cached(open_set, tmp_path: Path) -> None:
    first, second = (open_set("torchvision:FakeData", limit=6, cache=tmp_path) for _ in range(2))
    assert isinstance(second.pixels, np.memmap) and first.digest == second.digest
    assert len(list(tmp_path.glob("*.npy"))) == 1


@pytest.mark.parametrize("spec", ["timm:folder", "timm:torch/folder", "torchvision:ImageFolder"])
def test_a_folder_opened_by_name_gives_the_labels_of_its_wordnet_ids(
    open_set, make_tree: MakeTree, preprocess: Preprocess, spec: str
) -> None:
    root = make_tree()
    named = open_set(spec, root, head=1000)
    assert sorted(set(named.labels.tolist())) == list(WNID_INDICES) and named.classes == 1000
    plain = open_image_folder(str(root), head=1000, preprocess=preprocess, limit=None, strict=True, cache=None)
    np.testing.assert_array_equal(named.pixels, plain.pixels)
    np.testing.assert_array_equal(named.labels, plain.labels)


def packed(tree: Path, archive: Path, *, below: str = "") -> Path:
    """A tar of the tree's files."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(tree.rglob("*.png")):
            tar.add(path, arcname=below + path.relative_to(tree).as_posix())
    return archive


def test_an_archive_gives_what_its_folder_gives_and_what_timms_own_reader_gives(
    open_set, make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path
) -> None:
    tree = make_tree()
    archive = packed(tree, tmp_path / "images.tar")
    inside, outside = (open_set("timm:folder", data, head=1000) for data in (archive, tree))
    assert inside.ids == outside.ids and sorted(set(inside.labels.tolist())) == list(WNID_INDICES)
    np.testing.assert_array_equal(inside.labels, outside.labels)
    np.testing.assert_array_equal(inside.pixels, outside.pixels)
    theirs = timm.data.create_dataset("", root=str(archive), split="validation")
    assert [theirs.filename(position) for position in range(len(theirs))] == list(inside.ids)
    for position in range(len(theirs)):
        image, target = theirs[position]
        np.testing.assert_array_equal(inside.pixels[position], preprocess(image))
        assert inside.labels[position] == sorted(WNID_INDICES)[target], "WordNet ids in their order"
    theirs.reader.tar_state.tf.close()
    assert len(open_set("timm:folder", archive, head=1000, limit=2)) == 2


def test_archives_in_an_archive_keep_images_of_one_name_apart(open_set, make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree(("a", "b"), count=2)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(packed(tree / name, tmp_path / f"{name}.tar"), arcname=f"{name}.tar")
    images = open_set("timm:folder", tmp_path / "all.tar", head=2)
    assert sorted(images.ids) == [f"{name}.tar/image_0{number}.png" for name in "ab" for number in range(2)]
    assert [one.partition(".")[0] for one in images.ids] == ["ab"[label] for label in images.labels]


def test_an_archive_that_changes_in_place_is_decoded_again(open_set, make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree(("a", "b"), count=1)
    archive, cache = packed(tree, tmp_path / "images.tar"), tmp_path / "cache"
    first, again = (open_set("timm:folder", archive, head=2, cache=cache) for _ in range(2))
    assert first.digest == again.digest and len(list(cache.glob("*.npy"))) == 1, "what stays is not decoded again"
    Image.new("RGB", (40, 40), "red").save(tree / "a" / "image_00.png")
    packed(tree, archive)
    second = open_set("timm:folder", archive, head=2, cache=cache)
    assert second.ids == first.ids and second.digest != first.digest and (second.pixels[0] == (255, 0, 0)).all()


def test_a_pickled_data_set_that_changes_in_place_is_decoded_again(open_set, tmp_path: Path) -> None:
    def write(value: int) -> None:  # what torchvision would have unpacked of USPS, without its checksum
        with bz2.open(tmp_path / "usps.t.bz2", "wt") as file:
            for label in (1, 2):
                file.write(f"{label} " + " ".join(f"{place}:{value}" for place in range(1, 257)) + "\n")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torchvision.datasets.usps, "check_integrity", lambda *_: True, raising=False)
        write(1)
        first = open_set("torchvision:USPS", tmp_path, cache=tmp_path / "cache")
        write(-1)
        second = open_set("torchvision:USPS", tmp_path, cache=tmp_path / "cache")
    assert first.ids == second.ids and first.digest != second.digest


def test_timms_validation_folder_is_taken(open_set, make_tree: MakeTree) -> None:
    make_tree(("a", "b"), count=1, name="data/validation")
    root = make_tree(("a", "b"), count=4, name="data/train").parent
    assert len(open_set("timm:folder", root, head=2)) == 2
    assert len(open_set("timm:folder@train", root, head=2)) == 8


def test_a_broken_image_is_skipped_and_not_replaced_by_its_neighbour(open_set, make_tree: MakeTree) -> None:
    root = make_tree(("a", "b"), count=3)
    (root / "a" / "image_01.png").write_text("no image")
    images = open_set("timm:folder", root, head=2)
    assert len(images) == 5 and images.skipped == (("a/image_01.png", "not an image, or of an unknown format"),)
    with pytest.raises(WorkloadError, match="a/image_01.png"):
        open_set("timm:folder", root, head=2, strict=True)


def test_a_changed_file_of_a_named_folder_is_decoded_again(open_set, make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree(("a", "b"))
    first = open_set("timm:folder", root, head=2, cache=tmp_path / "cache")
    Image.new("RGB", (40, 40), "red").save(root / "a" / "image_00.png")
    second = open_set("timm:folder", root, head=2, cache=tmp_path / "cache")
    assert first.digest != second.digest and (second.pixels[0] == (255, 0, 0)).all()


def test_a_data_set_kept_on_disk_is_read_in_its_test_split(open_set, tmp_path: Path) -> None:
    # SVHN, USPS, … come in formats of their own; EuroSAT is a folder and is what torchvision would have unpacked
    folder = tmp_path / "eurosat" / "2750"
    for number in range(10):
        (folder / f"class_{number}").mkdir(parents=True)
        Image.new("RGB", (40, 40), (25 * number, 0, 0)).save(folder / f"class_{number}" / "a.png")
    images = open_set("torchvision:EuroSAT", tmp_path)
    assert images.labels.tolist() == list(range(10)) and images.pixels[4, 0, 0, 0] == 100


def test_a_number_of_classes_that_is_not_the_heads_is_refused(open_set, make_tree: MakeTree) -> None:
    with pytest.raises(WorkloadError, match="has 10 classes, but the model's head has 7"):
        open_set("torchvision:FakeData", limit=3, head=7)
    with pytest.raises(WorkloadError, match="no WordNet ids"):
        open_set("timm:folder", make_tree(("a", WNIDS[0])), head=1000)


def test_an_unknown_class_of_torchvision_names_the_nearest(open_set) -> None:
    with pytest.raises(WorkloadError, match="did you mean .*CIFAR10"):
        open_set("torchvision:Cifar10")


def test_a_data_set_that_is_not_there_asks_for_the_download(open_set, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"cannot be opened.*--download"):
        open_set("torchvision:CIFAR10", tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is downloaded unasked"


def test_a_data_set_kept_in_a_folder_needs_one(open_set) -> None:
    for name in ("torchvision:CIFAR10", "timm:torch/cifar10", "timm:folder"):
        with pytest.raises(WorkloadError, match="needs DATA=FOLDER"):
            open_set(name)


@pytest.mark.parametrize("name", ["torchvision:CIFAR10@val", "torchvision:DTD@tests", "torchvision:EMNIST"])
def test_a_split_that_does_not_exist_is_refused(open_set, tmp_path: Path, name: str) -> None:
    with pytest.raises(WorkloadError, match="split"):
        open_set(name, tmp_path)


def test_streams_are_refused(open_set) -> None:
    for name in ("timm:tfds/mnist", "timm:wds/shards", "timm:hfids/user/name"):
        with pytest.raises(WorkloadError, match="as a stream"):
            open_set(name)


def test_data_sets_that_are_no_classification_are_refused(open_set, tmp_path: Path) -> None:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    Image.new("RGB", (40, 40)).save(folder / "JPEGImages" / "a.jpg")
    (folder / "Annotations" / "a.xml").write_text("<annotation><filename>a.jpg</filename></annotation>")
    with pytest.raises(WorkloadError, match="a dict and no class: only classification"):
        open_set("torchvision:VOCDetection", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package `datasets` is installed")
def test_the_hub_says_which_package_it_needs(open_set) -> None:
    with pytest.raises(WorkloadError, match="pip install datasets"):
        open_set("hub:someone/something")


@pytest.mark.parametrize("name", ["hub:", "timm:", "torchvision:@val"])
def test_a_family_without_a_name_is_refused(open_set, name: str) -> None:
    with pytest.raises(WorkloadError, match="names no data set"):
        open_set(name)
