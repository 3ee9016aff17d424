"""Folders of images: layouts, class indices, broken input and the cache of decoded pixels."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ablations.workloads.base import Workload, WorkloadError
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.reading import Reading
from tests.workloads.conftest import WNID_INDICES, WNIDS, MakeTree, noise


@pytest.fixture
def open_folder(preprocess: Preprocess):
    """``open_image_folder`` with the defaults of a run; each can be overridden."""

    def open_with(root: Path | str | None, **changes) -> Workload:
        options = {"head": 1000, "preprocess": preprocess, "limit": None, "strict": False, "cache": None}
        return open_image_folder(None if root is None else str(root), **{**options, **changes})

    return open_with


def overwrite(path: Path) -> None:
    """Put other bytes of the same length and the same time of change into a file: only decoding it would notice."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# -- layouts and class indices


def test_wordnet_ids_decide_the_class_index_whatever_the_folder_order(make_tree: MakeTree, open_folder) -> None:
    images = open_folder(make_tree(WNIDS[::-1]))
    assert images.classes == 1000 and len(images) == 9
    expected = dict(zip(WNIDS, WNID_INDICES, strict=True))
    assert [expected[name.split("/")[0]] for name in images.ids] == images.labels.tolist()


def test_a_21k_head_numbers_wordnet_ids_by_its_own_set(make_tree: MakeTree, open_folder) -> None:
    images = open_folder(make_tree(("n01440764",)), head=21843)
    assert images.classes == 21843 and images.labels[0] not in WNID_INDICES


def test_images_come_in_the_order_of_their_names(make_tree: MakeTree, open_folder) -> None:
    images = open_folder(make_tree(count=2))
    assert images.ids == tuple(f"{cls}/image_{n:02d}.png" for cls in WNIDS for n in range(2))
    assert images.pixels.shape == (6, 32, 32, 3) and images.pixels.dtype == np.uint8


def test_any_folder_works_when_its_classes_match_the_head(make_tree: MakeTree, open_folder) -> None:
    images = open_folder(make_tree(("cat", "ant", "bee")), head=3)
    labels = {name.split("/")[0]: label for name, label in zip(images.ids, images.labels.tolist(), strict=True)}
    assert labels == {"ant": 0, "bee": 1, "cat": 2} and images.classes == 3


def test_wordnet_folders_count_in_order_for_a_head_of_their_number(make_tree: MakeTree, open_folder) -> None:
    assert sorted(set(open_folder(make_tree(), head=3).labels.tolist())) == [0, 1, 2]


def test_numbered_folders_count_as_numbers_and_say_so(make_tree: MakeTree, open_folder, caplog) -> None:
    root = make_tree(tuple(str(number) for number in range(11)), count=1)
    with caplog.at_level(logging.WARNING):
        images = open_folder(root, head=11)
    assert {name.split("/")[0]: str(label) for name, label in zip(images.ids, images.labels, strict=True)} == {
        str(number): str(number) for number in range(11)
    }
    assert "natural order" in caplog.text


def test_random_weights_follow_the_data(make_tree: MakeTree, open_folder) -> None:
    assert open_folder(make_tree(), head=None).classes == 1000
    assert open_folder(make_tree(("a", "b"), name="other"), head=None).classes == 2


def test_names_that_are_no_wordnet_ids_are_refused_with_the_remedy(make_tree: MakeTree, open_folder) -> None:
    with pytest.raises(WorkloadError, match=r"2 of 3 class names are no WordNet ids.*'cat', 'dog'.*head of 3 classes"):
        open_folder(make_tree(("n01440764", "cat", "dog")))


def test_a_number_of_classes_that_fits_no_head_is_refused(make_tree: MakeTree, open_folder) -> None:
    with pytest.raises(WorkloadError, match=r"has 3 classes, but the model's head has 10"):
        open_folder(make_tree(), head=10)


@pytest.mark.parametrize("split", ["val", "validation", "test"])
def test_the_validation_split_is_evaluated(make_tree: MakeTree, open_folder, split: str) -> None:
    make_tree(count=1, name=f"data/{split}")
    make_tree(count=4, name="data/train")
    images = open_folder(make_tree((), name="none").parent / "data")
    assert len(images) == 3 and images.ids[0] == "n01440764/image_00.png"


def test_val_is_preferred_to_test(make_tree: MakeTree, open_folder) -> None:
    make_tree(count=1, name="data/test")
    root = make_tree(count=2, name="data/val").parent
    assert len(open_folder(root)) == 6


def test_a_lone_training_split_is_not_evaluated_unasked(make_tree: MakeTree, open_folder) -> None:
    train = make_tree(name="data/train")
    with pytest.raises(WorkloadError, match=r"only a training split.*DATA=.*train"):
        open_folder(train.parent)
    assert len(open_folder(train)) == 9


def test_classes_may_be_called_like_splits(make_tree: MakeTree, open_folder) -> None:
    assert open_folder(make_tree(("test", "train")), head=2).classes == 2


def test_images_in_deeper_folders_belong_to_the_class_above(make_tree: MakeTree, open_folder) -> None:
    root = make_tree(count=1)
    (root / WNIDS[1] / "more").mkdir()
    noise((40, 40), seed=9).save(root / WNIDS[1] / "more" / "deep.PNG")
    images = open_folder(root)
    assert dict(zip(images.ids, images.labels.tolist(), strict=True))[f"{WNIDS[1]}/more/deep.PNG"] == WNID_INDICES[1]


# -- folders that cannot be used


@pytest.mark.parametrize("data", [None, ""])
def test_a_folder_must_be_named(open_folder, data: str | None) -> None:
    with pytest.raises(WorkloadError, match="needs DATA=FOLDER"):
        open_folder(data)


def test_a_missing_folder_is_named(tmp_path: Path, open_folder) -> None:
    with pytest.raises(WorkloadError, match=r"nowhere does not exist"):
        open_folder(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path, open_folder) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WorkloadError, match="is a file"):
        open_folder(tmp_path / "file")


def test_an_empty_folder_says_what_belongs_there(tmp_path: Path, open_folder) -> None:
    with pytest.raises(WorkloadError, match="holds no images: it needs one folder for each class"):
        open_folder(tmp_path)


def test_images_without_class_folders_say_what_to_do(tmp_path: Path, open_folder) -> None:
    noise((40, 40), seed=1).save(tmp_path / "lone.png")
    with pytest.raises(WorkloadError, match="no class folders: put each image into a folder"):
        open_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every folder")
def test_an_unreadable_folder_is_refused(make_tree: MakeTree, open_folder) -> None:
    root = make_tree()
    root.chmod(0)
    try:
        with pytest.raises(WorkloadError, match="cannot be read"):
            open_folder(root)
    finally:
        root.chmod(0o755)


# -- images that cannot be read


def break_images(root: Path) -> dict[str, str]:
    """Spoil a tree in every way; returns the id of each spoiled image and a word of the reason that must be given."""
    folder = root / WNIDS[0]
    whole = folder / "image_00.png"
    (folder / "truncated.png").write_bytes(whole.read_bytes()[:-40])
    noise((64, 64), seed=3).save(folder / "whole.jpg", quality=95)
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-300])
    (folder / "whole.jpg").unlink()
    (folder / "empty.jpg").touch()
    (folder / "text.jpeg").write_text("this is no image")
    outside = root.parent / "outside.png"
    noise((40, 40), seed=5).save(outside)
    (folder / "escape.png").symlink_to(outside)
    (folder / "broken.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (root.parent / "elsewhere").mkdir()
    (folder / "linked").symlink_to(root.parent / "elsewhere")
    (root / "n09999999").symlink_to(root.parent / "elsewhere")
    return {
        f"{WNIDS[0]}/truncated.png": "truncated",
        f"{WNIDS[0]}/truncated.jpg": "truncated",
        f"{WNIDS[0]}/empty.jpg": "not an image",
        f"{WNIDS[0]}/text.jpeg": "not an image",
        f"{WNIDS[0]}/escape.png": "leaves the folder",
        f"{WNIDS[0]}/broken.png": "broken link",
        f"{WNIDS[0]}/loop.png": "broken link",
        f"{WNIDS[0]}/linked": "not followed",
        "n09999999": "not followed",
    }


def test_broken_images_are_skipped_counted_and_given_a_reason(make_tree: MakeTree, open_folder, caplog) -> None:
    root = make_tree()
    expected = break_images(root)
    images = open_folder(root, reading=Reading(links=False))
    assert len(images) == 9
    reasons = dict(images.skipped)
    assert set(reasons) == set(expected)
    for file, word in expected.items():
        assert reasons[file] and word in reasons[file]
        assert file in caplog.text


def test_broken_images_are_refused_under_strict(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    root = make_tree()
    (root / WNIDS[0] / "text.jpeg").write_text("this is no image")
    for _ in range(2):  # decoded, then from the cache
        with pytest.raises(WorkloadError, match=r"1 image\(s\) cannot be used \(n01440764/text\.jpeg: not an image"):
            open_folder(root, strict=True, cache=tmp_path / "cache")


def test_the_skipped_are_reported_from_the_cache_too(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    root = make_tree()
    break_images(root)
    first, second = (open_folder(root, cache=tmp_path / "cache", reading=Reading(links=False)) for _ in range(2))
    assert first.skipped == second.skipped and len(first.skipped) == 9


def test_a_folder_of_nothing_but_broken_images_is_refused(tmp_path: Path, open_folder) -> None:
    (tmp_path / "data" / "n01440764").mkdir(parents=True)
    (tmp_path / "data" / "n01440764" / "a.jpg").write_text("no image")
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(WorkloadError, match=r"none of 1 images can be read \(n01440764/a\.jpg: not an image"):
            open_folder(tmp_path / "data", cache=cache)
    assert not any((tmp_path / "cache").iterdir())


def test_a_decompression_bomb_is_skipped(make_tree: MakeTree, open_folder, monkeypatch) -> None:
    root = make_tree(count=1)
    noise((90, 90), seed=8).save(root / WNIDS[0] / "bomb.png")
    noise((60, 60), seed=8).save(root / WNIDS[0] / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 50)
    images = open_folder(root)
    assert len(images) == 3 and {file for file, _ in images.skipped} == {
        f"{WNIDS[0]}/{n}.png" for n in ("bomb", "large")
    }
    assert all("bomb" in reason for _, reason in images.skipped)


def test_files_that_are_no_images_are_left_alone(make_tree: MakeTree, open_folder) -> None:
    root = make_tree()
    (root / "README.txt").write_text("notes")
    (root / WNIDS[0] / "labels.csv").write_text("a,b")
    (root / WNIDS[0] / "._image_00.png").write_bytes(b"\0\5\26\7")
    (root / ".git").mkdir()
    (root / "logs").mkdir()
    images = open_folder(root, strict=True)
    assert len(images) == 9 and images.skipped == ()


def test_a_link_that_stays_inside_is_followed(make_tree: MakeTree, open_folder) -> None:
    root = make_tree(count=1)
    (root / ".pool").mkdir()
    noise((40, 40), seed=11).save(root / ".pool" / "shared.png")
    (root / WNIDS[0] / "again.png").symlink_to(root / ".pool" / "shared.png")
    assert len(open_folder(root, strict=True)) == 4


def test_images_of_every_mode_are_read(make_tree: MakeTree, open_folder) -> None:
    root = make_tree(count=1)
    folder = root / WNIDS[0]
    noise((40, 40), seed=1, mode="CMYK").save(folder / "cmyk.jpg")
    noise((40, 40), seed=1, mode="P").save(folder / "palette.png")
    noise((40, 40), seed=1, mode="L").save(folder / "grey.jpg")
    noise((40, 40), seed=1, mode="RGBA").save(folder / "alpha.webp")
    noise((40, 40), seed=1).save(folder / "moving.gif", save_all=True, append_images=[noise((40, 40), seed=2)])
    images = open_folder(root, strict=True)
    assert len(images) == 8 and images.pixels.shape == (8, 32, 32, 3)


def test_a_name_that_is_no_utf8_gets_an_id_that_can_be_written(make_tree: MakeTree, open_folder) -> None:
    root = make_tree(count=1)
    name = os.fsencode(root / WNIDS[0]) + b"/caf\xe9.png"
    try:
        os.rename(root / WNIDS[0] / "image_00.png", name)  # noqa: PTH104  pathlib takes no bytes
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    images = open_folder(root)
    assert f"{WNIDS[0]}/caf\\xe9.png" in images.ids
    assert "\\xe9" in json.dumps(images.ids).encode("utf-8").decode()


# -- limits, digests, the cache


def test_a_limit_is_spread_over_the_classes_and_stable(make_tree: MakeTree, open_folder) -> None:
    root = make_tree(count=6)
    some = open_folder(root, limit=6)
    assert np.unique(some.labels, return_counts=True)[1].tolist() == [2, 2, 2]
    noise((40, 40), seed=77).save(root / WNIDS[0] / "zzz.txt.png")
    again = open_folder(root, limit=6)
    kept = set(some.ids) & set(again.ids)
    assert len(kept) >= 5  # a new image can take at most one place
    assert open_folder(root, limit=1000).ids == open_folder(root).ids


def test_the_digest_is_stable_and_follows_the_images(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    root = make_tree()
    in_memory = open_folder(root)
    assert in_memory.digest == open_folder(root, cache=tmp_path / "cache").digest
    assert in_memory.digest == open_folder(make_tree(name="copy")).digest
    assert in_memory.digest != open_folder(root, limit=8).digest
    noise((40, 36), seed=999).save(root / WNIDS[0] / "image_00.png")
    assert in_memory.digest != open_folder(root, cache=tmp_path / "cache").digest


def test_the_second_open_decodes_nothing(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    root, cache = make_tree(), tmp_path / "cache"
    first = open_folder(root, cache=cache)
    pixels = np.array(first.pixels)
    for path in root.rglob("*.png"):
        overwrite(path)  # every image is now rubbish that looks unchanged
    second = open_folder(root, cache=cache, strict=True)
    assert isinstance(second.pixels, np.memmap)
    np.testing.assert_array_equal(second.pixels, pixels)
    assert (second.digest, second.ids) == (first.digest, first.ids)


def test_a_changed_image_is_decoded_again(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    root, cache = make_tree(), tmp_path / "cache"
    first = open_folder(root, cache=cache)
    path = root / WNIDS[0] / "image_00.png"
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    overwrite(root / WNIDS[0] / "image_01.png")
    second = open_folder(root, cache=cache)
    assert len(first) == 9 and [file for file, _ in second.skipped] == [f"{WNIDS[0]}/image_01.png"]


def test_a_cache_that_lost_some_of_its_bytes_is_made_again(
    make_tree: MakeTree, open_folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a power cut: the file has its size, and holes."""
    root, cache = make_tree(), tmp_path / "cache"
    first = open_folder(root, cache=cache)
    true = np.array(first.pixels)
    (path,) = cache.glob("*.npy")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size - file.tell()))
    second = open_folder(root, cache=cache)
    assert second.digest == first.digest and (second.pixels == true).all()
    assert "no longer what they were" in caplog.text
    (names,) = cache.glob("*.json")
    names.write_text(names.read_text().replace('"labels": [', '"labels": [1', 1))
    third = open_folder(root, cache=cache)
    assert third.digest == first.digest and (third.labels == first.labels).all()
    assert "not what was written" in caplog.text


def test_another_preprocessing_has_a_cache_of_its_own(
    make_tree: MakeTree, open_folder, preprocess, tmp_path: Path
) -> None:
    root, cache = make_tree(size=(50, 50)), tmp_path / "cache"
    default = np.array(open_folder(root, cache=cache).pixels)
    never = open_folder(root, cache=cache, preprocess=dataclasses.replace(preprocess, resize="never"))
    assert not np.array_equal(default, never.pixels)
    np.testing.assert_array_equal(open_folder(root, cache=cache).pixels, default)


@pytest.mark.parametrize("suffix", ["json", "npy"])
@pytest.mark.parametrize("damage", [b"", b"half of a fi", b"[]"])
def test_a_damaged_cache_is_made_again(make_tree: MakeTree, open_folder, tmp_path: Path, suffix, damage) -> None:
    root, cache = make_tree(), tmp_path / "cache"
    first = np.array(open_folder(root, cache=cache).pixels)
    (file,) = cache.glob(f"*.{suffix}")
    file.write_bytes(damage)
    np.testing.assert_array_equal(open_folder(root, cache=cache).pixels, first)


def test_a_cache_that_lost_its_pixels_is_made_again(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    root, cache = make_tree(), tmp_path / "cache"
    first = np.array(open_folder(root, cache=cache).pixels)
    (file,) = cache.glob("*.npy")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    np.testing.assert_array_equal(open_folder(root, cache=cache).pixels, first)


def test_a_cache_that_cannot_be_written_names_the_remedy(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkloadError, match="choose another OUT"):
        open_folder(make_tree(), cache=tmp_path / "file" / "cache")


def test_the_cache_leaves_no_half_files(make_tree: MakeTree, open_folder, tmp_path: Path) -> None:
    open_folder(make_tree(), cache=tmp_path / "cache")
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy"]
