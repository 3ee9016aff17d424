"""Everything that is wrong with images on a shared disk: skipped or read, and in either case counted and named."""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from ablations.workloads import problems
from ablations.workloads.base import WorkloadError
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.named import open_named
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import kind_of, reason_of
from tests.samples import shared_out
from tests.workloads.conftest import WNIDS, MakeTree, Open, folder_opener, noise

NOBODY = 65534


@pytest.fixture
def open_folder(preprocess: Preprocess) -> Open:
    return folder_opener(preprocess, strict=False)


def png(width: int, height: int, rows: bytes) -> bytes:
    """A black and white PNG of any claimed size around the given rows of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def save(path: Path, size: tuple[int, int] = (40, 36), mode: str = "RGB", **options) -> None:
    """A picture of its own, of any mode; ``format`` may be another than the name says."""
    noise(size, seed=zlib.crc32(path.name.encode()), mode=mode).save(path, **options)


def cut(path: Path, *, keep: float, **options) -> None:
    save(path, (96, 96), **options)
    content = path.read_bytes()
    path.write_bytes(content[: round(keep * len(content))])


def flip(path: Path) -> None:
    """Zeros in the middle of a PNG's compressed pixels, its checksum as before."""
    save(path, (96, 96))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))


SKIPPED: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "half.png": (lambda path: cut(path, keep=0.5), {problems.TRUNCATED}),
    "half.jpg": (lambda path: cut(path, keep=0.5), {problems.TRUNCATED}),
    "half.webp": (lambda path: cut(path, keep=0.5), {problems.TRUNCATED, problems.DAMAGED, problems.NOT_AN_IMAGE}),
    "half.gif": (lambda path: cut(path, keep=0.5), {problems.TRUNCATED, problems.DAMAGED}),
    "half.bmp": (lambda path: cut(path, keep=0.5), {problems.TRUNCATED}),
    "half.tif": (lambda path: cut(path, keep=0.5), {problems.TRUNCATED, problems.DAMAGED, problems.NOT_AN_IMAGE}),
    "head.jpg": (lambda path: cut(path, keep=0.01), {problems.TRUNCATED, problems.NOT_AN_IMAGE}),
    "flipped.png": (flip, {problems.TRUNCATED, problems.DAMAGED}),
    "empty.jpg": (Path.touch, {problems.NOT_AN_IMAGE}),
    "page.jpg": (lambda path: path.write_text("<!DOCTYPE html>") and None, {problems.NOT_AN_IMAGE}),
    "dot.png": (lambda path: save(path, (1, 1)), {problems.NO_PICTURE}),
    "line.png": (lambda path: save(path, (40, 1)), {problems.NO_PICTURE}),
    "bomb.png": (lambda path: path.write_bytes(png(100_000, 100_000, b"")) and None, {problems.BOMB}),
    "large.png": (lambda path: path.write_bytes(png(10_000, 9_500, bytes(1251 * 9_500))) and None, {problems.BOMB}),
    "strip.png": (lambda path: save(path, (2, 150_000)), {"too elongated"}),
    "real.tif": (lambda path: Image.new("F", (40, 40), 0.5).save(path), {"pixels without an agreed range"}),
    "gone.png": (lambda path: path.symlink_to(path.parent / "nowhere.png"), {problems.BROKEN_LINK}),
    "loop.png": (lambda path: path.symlink_to(path), {problems.BROKEN_LINK}),
    "folder_link": (lambda path: path.symlink_to(path.parents[1]), {problems.CIRCLE}),
    "pipe.jpg": (os.mkfifo, {problems.SPECIAL}),
    "image_00_copy.png": (
        lambda path: path.write_bytes((path.parent / "image_00.png").read_bytes()) and None,
        {problems.COPY},
    ),
}  # fmt: skip

NOTED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "is_png.jpg": (lambda path: save(path, format="PNG"), [problems.MISLABELLED]),
    "is_jpeg.png": (lambda path: save(path, format="JPEG"), [problems.MISLABELLED]),
    "cmyk.jpg": (lambda path: save(path, mode="CMYK"), [problems.CMYK]),
    "cmyk.tif": (lambda path: save(path, mode="CMYK"), [problems.CMYK]),
    "palette.png": (lambda path: save(path, mode="P"), [problems.PALETTE]),
    "clear.png": (lambda path: save(path, mode="RGBA"), [problems.TRANSPARENT]),
    "deep.png": (
        lambda path: Image.fromarray(np.full((40, 40), 30_000, dtype=np.uint16)).save(path), [problems.DEEP],
    ),
    "moving.webp": (
        lambda path: save(path, save_all=True, append_images=[noise((40, 36), seed=5)]), [problems.FRAMES],
    ),
    "moving.gif": (
        lambda path: save(path, mode="P", save_all=True, append_images=[noise((40, 36), seed=6, mode="P")]),
        [problems.PALETTE, problems.FRAMES],
    ),
    "both.jpg": (lambda path: save(path, mode="P", format="PNG"), [problems.MISLABELLED, problems.PALETTE]),
    "grey.jpg": (lambda path: save(path, mode="L"), []),
    "plain.JPEG": (lambda path: save(path, format="JPEG"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", shared_out(SKIPPED))  # all of them together are read below
def test_an_image_that_cannot_be_used_is_skipped_and_counted(make_tree: MakeTree, open_folder: Open, name: str) -> None:
    root = make_tree(count=1)
    spoil, kinds = SKIPPED[name]
    spoil(root / WNIDS[0] / name)
    images = open_folder(root)
    (entry,) = images.skipped
    assert len(images) == 3 and entry[0] == f"{WNIDS[0]}/{name}"
    assert kind_of(entry[1]) in kinds, entry
    assert images.account is not None
    counts = images.account.as_data(images.skipped)
    assert counts["skipped"] == {kind_of(entry[1]): 1} and counts["noted"] == {}
    assert (counts["found"], counts["used"]) == (4, 3)
    with pytest.raises(WorkloadError, match=r"1 image\(s\) cannot be used .*--strict"):
        open_folder(root, strict=True)


@pytest.mark.parametrize("name", NOTED)
def test_an_unusual_image_is_read_and_counted(make_tree: MakeTree, open_folder: Open, name: str) -> None:
    root = make_tree(count=1)
    make, kinds = NOTED[name]
    make(root / WNIDS[0] / name)
    images = open_folder(root, strict=True)
    assert len(images) == 4 and f"{WNIDS[0]}/{name}" in images.ids and images.skipped == ()
    assert images.account is not None
    assert [kind_of(note) for _, note in images.account.notes] == kinds
    assert images.account.as_data(())["noted"] == dict.fromkeys(kinds, 1)


def spoilt(root: Path) -> None:
    """Every kind of bad and of unusual image in one class folder."""
    for name, (make, _) in itertools.chain(SKIPPED.items(), NOTED.items()):
        make(root / WNIDS[0] / name)


def test_all_of_them_together_are_all_accounted_for(make_tree: MakeTree, open_folder: Open, tmp_path: Path) -> None:
    root = make_tree(count=2)
    spoilt(root)
    (root / WNIDS[1] / "notes.txt").write_text("no image by its name")
    fresh = open_folder(root, cache=tmp_path / "cache")
    cached = open_folder(root, cache=tmp_path / "cache")
    in_memory = open_folder(root)
    assert fresh.account == cached.account == in_memory.account and fresh.digest == cached.digest == in_memory.digest
    assert fresh.skipped == cached.skipped == in_memory.skipped
    assert {file.split("/", 1)[1] for file, _ in fresh.skipped} == set(SKIPPED)
    assert fresh.account is not None
    counts = fresh.account.as_data(fresh.skipped)
    assert counts["found"] == 6 + len(SKIPPED) + len(NOTED) and counts["ignored_files"] == 1
    assert counts["used"] == len(fresh) == 6 + len(NOTED)
    assert sum(counts["skipped"].values()) == len(SKIPPED)
    assert counts["noted"] == dict(Counter(kind for _, kinds in NOTED.values() for kind in kinds).most_common())


@pytest.mark.parametrize("limit", [3, 6, 20, 1000])
def test_with_a_limit_what_is_left_out_is_counted_too(make_tree: MakeTree, open_folder: Open, limit: int) -> None:
    root = make_tree(count=4)
    spoilt(root)
    images = open_folder(root, limit=limit)
    assert images.account is not None
    counts = images.account.as_data(images.skipped)
    assert counts["found"] == counts["used"] + counts["left_out_by_limit"] + sum(counts["skipped"].values())
    assert counts["found"] == 12 + len(SKIPPED) + len(NOTED)


# -- what the system does not give


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Nobody may read everything: the superuser becomes somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_tree() -> Iterator[Path]:
    """Three classes of two images each below a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "cache").mkdir()
        (Path(folder) / "cache").chmod(0o777)
        root = Path(folder) / "data"
        for wnid, number in itertools.product(WNIDS, range(2)):
            (root / wnid).mkdir(parents=True, exist_ok=True)
            save(root / wnid / f"{wnid}_{number}.png")
        with ordinary_user():
            if not os.access(root, os.R_OK | os.X_OK, effective_ids=True):
                pytest.skip("the temporary folder is closed to other users")
        yield root


def test_a_file_that_may_not_be_read_is_skipped_until_it_may(public_tree: Path, open_folder: Open) -> None:
    """Permissions change neither a file's size nor its time: the cache must find out by itself."""
    everything = open_folder(public_tree)
    cache, closed = public_tree.parent / "cache", public_tree / WNIDS[0] / f"{WNIDS[0]}_0.png"
    closed.chmod(0)
    for _ in range(2):  # read, then from the cache
        with ordinary_user():
            images = open_folder(public_tree, cache=cache)
        assert images.skipped == ((f"{WNIDS[0]}/{closed.name}", f"{problems.UNREADABLE}: Permission denied"),)
        assert len(images) == 5
    closed.chmod(0o644)
    with ordinary_user():
        mended = open_folder(public_tree, cache=cache)
    assert mended.skipped == () and mended.digest == everything.digest


def test_a_class_folder_that_may_not_be_entered_is_an_empty_class(public_tree: Path, open_folder: Open) -> None:
    open_folder(public_tree)
    closed = public_tree / WNIDS[1]
    closed.chmod(0)
    try:
        with ordinary_user():
            images = open_folder(public_tree)
    finally:
        closed.chmod(0o755)
    assert images.skipped == ((WNIDS[1], f"{problems.UNREADABLE_FOLDER}: Permission denied"),)
    assert images.account is not None
    assert images.account.empty_classes == (WNIDS[1],) and len(images) == 4


def test_a_file_that_vanishes_while_the_folder_is_read_is_skipped(
    make_tree: MakeTree, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ablations.workloads import image_folder
    from ablations.workloads.folders import found

    root = make_tree(count=2)
    listed = found.find_images(root)
    (root / WNIDS[2] / "image_01.png").unlink()
    monkeypatch.setattr(image_folder, "find_images", lambda _, **__: listed)
    images = open_image_folder(str(root), head=1000, preprocess=preprocess, limit=None, strict=False, cache=None)
    assert images.skipped == ((f"{WNIDS[2]}/image_01.png", f"{problems.UNREADABLE}: No such file or directory"),)


# -- classes


def test_a_class_without_an_image_is_counted(make_tree: MakeTree, open_folder: Open, caplog) -> None:
    root = make_tree(WNIDS[:2])
    (root / WNIDS[2]).mkdir()
    (root / "logs").mkdir()
    images = open_folder(root)
    assert images.account is not None
    assert images.account.empty_classes == (WNIDS[2],), "logs is no class of ImageNet"
    assert images.account.as_data(()).get("empty_classes") == [WNIDS[2]]
    assert f"no image that can be used in {WNIDS[2]}" in caplog.text


def test_a_class_of_broken_images_alone_is_an_empty_class(make_tree: MakeTree, open_folder: Open) -> None:
    root = make_tree()
    for path in (root / WNIDS[1]).iterdir():
        path.write_text("no image")
    images = open_folder(root)
    assert images.account is not None
    assert images.account.empty_classes == (WNIDS[1],) and len(images.skipped) == 3
    assert set(images.labels.tolist()) == {0, 701}


def test_an_empty_class_keeps_its_number(make_tree: MakeTree, open_folder: Open) -> None:
    """Without it every class behind would be taken for the one before."""
    root = make_tree(("ant", "cat", "dog"))
    (root / "bee").mkdir()
    for head in (4, None):
        images = open_folder(root, head=head)
        labels = {name.split("/")[0]: label for name, label in zip(images.ids, images.labels.tolist(), strict=True)}
        assert labels == {"ant": 0, "cat": 2, "dog": 3} and images.classes == 4
        assert images.account is not None
        assert images.account.empty_classes == ("bee",)


def test_an_empty_folder_is_no_class_where_the_head_has_no_place_for_it(
    make_tree: MakeTree, open_folder: Open, caplog
) -> None:
    root = make_tree(("ant", "cat"))
    (root / "bee").mkdir()
    images = open_folder(root, head=2)
    assert sorted(set(images.labels.tolist())) == [0, 1]
    assert "the empty folders bee are taken for no classes" in caplog.text
    with pytest.raises(WorkloadError, match=r"has 3 classes, but the model's head has 5"):
        open_folder(root, head=5)


class Labelled:
    """A data set of two images with labels as given, in torchvision's form."""

    num_classes = 3
    labels = (0, 3)

    def __init__(self) -> None:
        self.targets = list(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return noise((40, 40), seed=index), self.labels[index]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 3), r"1 of 2 labels are outside 0\.\.2, the classes of the model's head \(the first: 000001 has 3\)"),
        ((-1, 1), r"has 1 images without a label"),
        ((7, 8), r"2 of 2 labels are outside 0\.\.2"),
    ],
)
def test_labels_outside_the_head_are_refused_and_counted(
    preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch, labels: tuple[int, int], message: str
) -> None:
    data_set = type("Labelled", (Labelled,), {"labels": labels})
    monkeypatch.setattr(torchvision.datasets, "Labelled", data_set, raising=False)
    monkeypatch.setattr(torchvision.datasets, "__all__", (*torchvision.datasets.__all__, "Labelled"))
    with pytest.raises(WorkloadError, match=message):
        open_named(
            "torchvision:Labelled", data=None, head=3, preprocess=preprocess, limit=None, strict=False, cache=None
        )


def test_the_named_data_set_accounts_for_its_images_too(make_tree: MakeTree, preprocess: Preprocess) -> None:
    root = make_tree(("a", "b", "c"), count=2)
    (root / "a" / "image_01.png").write_text("no image")
    for path in (root / "b").iterdir():
        path.write_text("no image")
    save(root / "c" / "image_00.png", mode="P")
    images = open_named(
        "timm:folder", data=str(root), head=3, preprocess=preprocess, limit=None, strict=False, cache=None
    )
    assert images.account is not None
    assert images.account.as_data(images.skipped) == {
        "found": 6, "used": 3, "left_out_by_limit": 0, "skipped": {problems.NOT_AN_IMAGE: 3},
        "noted": {problems.PALETTE: 1},
        "noted_files": [["c/image_00.png", "a palette: its colours are looked up"]],
        "empty_classes": ["b"], "ignored_files": 0, "links": 0, "label_file": "",
        "label_lines": {}, "label_lines_listed": [],
    }  # fmt: skip


# -- reasons


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (problems.Unusable("too elongated: 1 x 9"), "too elongated: 1 x 9"),
        (PermissionError(13, "Permission denied", "a.jpg"), "cannot be read: Permission denied"),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (OSError("image file is truncated"), "truncated: image file is truncated"),
        (EOFError("no more"), "truncated: no more"),
        (SyntaxError("broken PNG file"), "damaged: broken PNG file"),
        (struct.error(), "damaged: error"),
        (MemoryError(), "too large for the memory: MemoryError"),
        (ValueError("one\n\ntwo"), "damaged: one two"),
    ],
)  # fmt: skip
def test_a_reason_begins_with_its_kind(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
    assert kind_of(reason) == reason.split(":")[0]
