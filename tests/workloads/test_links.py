"""Subsets made of links: followed wherever they lead, counted, and never round in circles."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets import ImageFolder

from ablations.workloads import problems
from ablations.workloads.base import WorkloadError
from ablations.workloads.photographs import Photographs
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import kind_of
from ablations.workloads.reading import ImageSource, Reading
from ablations.workloads.training import TrainingAccess, training_root
from tests.workloads.conftest import WNIDS, MakeTree, Open, noise


def of_folders(pool: Path, root: Path) -> None:
    root.mkdir()
    for wnid in WNIDS:
        (root / wnid).symlink_to(pool / wnid)


def of_images(pool: Path, root: Path) -> None:
    for path in pool.rglob("*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).symlink_to(path)


def of_a_split(pool: Path, root: Path) -> None:
    (root / "train" / WNIDS[0]).mkdir(parents=True)
    (root / "val").symlink_to(pool)


def itself(pool: Path, root: Path) -> None:
    root.symlink_to(pool)


@pytest.mark.parametrize(("link", "counted"), [(of_folders, 9), (of_images, 9), (of_a_split, 0), (itself, 0)])
def test_a_subset_made_of_links_is_the_same_as_one_made_of_copies(
    make_tree: MakeTree, open_folder: Open, tmp_path: Path, link: Callable[[Path, Path], None], counted: int
) -> None:
    pool = make_tree(name="pool")
    link(pool, tmp_path / "subset")
    plain, linked = open_folder(pool), open_folder(tmp_path / "subset")
    assert linked.ids == plain.ids and linked.digest == plain.digest and linked.skipped == ()
    assert linked.account is not None and linked.account.as_data(())["links"] == counted


def test_the_same_images_are_found_as_by_torchvision_and_timm(
    make_tree: MakeTree, open_folder: Open, tmp_path: Path
) -> None:
    pool, root = make_tree(name="pool"), make_tree(WNIDS[:1], name="data")
    (root / WNIDS[1]).symlink_to(pool / WNIDS[1])
    (root / WNIDS[2]).mkdir()
    (root / WNIDS[2] / "deeper").symlink_to(pool / WNIDS[2])
    (root / WNIDS[2] / "one.png").symlink_to(pool / WNIDS[0] / "image_02.png")
    (root / WNIDS[0] / "image_02.png").unlink()
    ours = set(open_folder(root).ids)
    torchvision_s = {os.path.relpath(path, root) for path, _ in ImageFolder(str(root)).samples}
    timm_s = {os.path.relpath(path, root) for path, _ in find_images_and_targets(str(root))[0]}
    assert ours == torchvision_s == timm_s and len(ours) == 9


def test_a_link_in_a_circle_ends_and_is_named(make_tree: MakeTree, open_folder: Open) -> None:
    root = make_tree(count=1)
    first = root / WNIDS[0]
    (first / "up").symlink_to(root)
    (first / "self").symlink_to(first)
    (first / "higher").symlink_to(root.parent)
    (root / WNIDS[1] / "other").symlink_to(first)  # no circle by itself: the same picture in two classes
    (root / "n01443537").symlink_to(root)
    images = open_folder(root, strict=False)
    reasons = {name: kind_of(reason) for name, reason in images.skipped}
    circles = {name for name, reason in reasons.items() if reason == problems.CIRCLE}
    assert {f"{WNIDS[0]}/{name}" for name in ("up", "self", "higher")} | {"n01443537"} <= circles
    assert reasons[f"{WNIDS[0]}/image_00.png"] == problems.CONTRADICTION
    assert len(images) == 2


def test_a_tower_of_links_is_not_climbed_twice(make_tree: MakeTree, open_folder: Open, tmp_path: Path) -> None:
    """Two links to the next storey in each of thirty would be a thousand million folders."""
    root = make_tree(count=1)
    tower = tmp_path / "tower"
    for storey in range(30):
        (tower / str(storey)).mkdir(parents=True)
        for name in ("a", "b"):
            (tower / str(storey) / name).symlink_to(tower / str(storey + 1))
    (tower / "30").mkdir()
    noise((40, 40), seed=5).save(tower / "30" / "top.png")
    (root / WNIDS[0] / "tower").symlink_to(tower / "0")
    images = open_folder(root, strict=False)
    assert sum(name.endswith("top.png") for name in images.ids) == 1
    assert {kind_of(reason) for _, reason in images.skipped} == {problems.FOLDER_TWICE} and len(images.skipped) == 30


def test_a_folder_that_is_there_twice_is_read_under_its_own_name(make_tree: MakeTree, open_folder: Open) -> None:
    root = make_tree(count=1)
    (root / WNIDS[0] / "z").mkdir()
    noise((40, 40), seed=5).save(root / WNIDS[0] / "z" / "deep.png")
    (root / WNIDS[0] / "a").symlink_to(root / WNIDS[0] / "z")
    images = open_folder(root, strict=False)
    assert f"{WNIDS[0]}/z/deep.png" in images.ids
    assert [(name, kind_of(reason)) for name, reason in images.skipped] == [(f"{WNIDS[0]}/a", problems.FOLDER_TWICE)]


def test_a_class_folder_whose_link_is_broken_is_named(make_tree: MakeTree, open_folder: Open) -> None:
    root = make_tree(WNIDS[:2])
    (root / WNIDS[2]).symlink_to(root.parent / "gone")
    assert open_folder(root, strict=False).skipped == ((WNIDS[2], problems.BROKEN_LINK),)
    with pytest.raises(WorkloadError, match=f"{WNIDS[2]}: a broken link"):
        open_folder(root)


def test_links_are_not_followed_where_that_is_asked_for(make_tree: MakeTree, open_folder: Open, tmp_path: Path) -> None:
    pool, root = make_tree(name="pool"), make_tree(WNIDS[:1], count=1)
    (root / WNIDS[1]).symlink_to(pool / WNIDS[1])
    (root / WNIDS[0] / "out.png").symlink_to(pool / WNIDS[0] / "image_01.png")
    images = open_folder(root, strict=False, reading=Reading(links=False))
    assert {name: kind_of(reason) for name, reason in images.skipped} == {
        WNIDS[1]: problems.FOLDER_LINK, f"{WNIDS[0]}/out.png": problems.OUTSIDE_LINK,
    }  # fmt: skip
    with pytest.raises(WorkloadError, match="without --no-links"):
        open_folder(root, reading=Reading(links=False))


def test_a_link_turned_to_another_file_of_the_same_size_and_time_is_read_again(
    make_tree: MakeTree, open_folder: Open, tmp_path: Path
) -> None:
    pool, root = tmp_path / "pool", make_tree(count=1)
    pool.mkdir()
    for name, seed in (("a.bmp", 1), ("b.bmp", 2)):
        noise((40, 40), seed=seed).save(pool / name)
        os.utime(pool / name, ns=(10**18, 10**18))
    link = root / WNIDS[0] / "turned.bmp"
    found = []
    for name in ("a.bmp", "b.bmp"):
        link.unlink(missing_ok=True)
        link.symlink_to(pool / name)
        images = open_folder(root, cache=tmp_path / "cache")
        found.append(np.array(images.pixels[images.ids.index(f"{WNIDS[0]}/turned.bmp")]))
    assert not np.array_equal(*found)


def test_links_to_evaluated_images_are_never_trained_on(
    make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path
) -> None:
    evaluated, train = make_tree(name="data/val"), make_tree(WNIDS[:2], name="data/train", count=2)
    access = TrainingAccess(
        ImageSource("imagefolder", str(tmp_path / "data")), "test_vit", tmp_path / "cache", classes=1000
    )
    assert len(access.open(augment="none", holdout=0, seed=0)) == 4
    (train / WNIDS[2]).symlink_to(evaluated / WNIDS[2])
    with pytest.raises(WorkloadError, match="3 training images are, behind links, images to evaluate"):
        access.open(augment="none", holdout=0, seed=0)
    alias = tmp_path / "alias"
    alias.symlink_to(evaluated)
    with pytest.raises(WorkloadError, match="overlap"):
        training_root(str(tmp_path / "data"), str(alias), workload="imagefolder")


def test_training_folders_may_be_links(make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path) -> None:
    of_folders(make_tree(name="pool"), tmp_path / "linked")
    options = {"head": 1000, "preprocess": preprocess, "cache": tmp_path, "augment": "none", "holdout": 0, "seed": 0}
    plain, linked = (Photographs(root, **options) for root in (tmp_path / "pool", tmp_path / "linked"))  # type: ignore[arg-type]
    assert [entry[:2] for entry in linked.entries] == [entry[:2] for entry in plain.entries]
    assert linked.digest == plain.digest
