"""Formats of images: every one that Pillow can read as a picture, and none that starts a program."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ablations.workloads import problems
from ablations.workloads.base import Workload
from ablations.workloads.formats import formats, suffixes
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import kind_of
from tests.samples import sampled
from tests.workloads.conftest import WNIDS, MakeTree, noise

Open = Callable[..., Workload]


@pytest.fixture
def open_folder(preprocess: Preprocess) -> Open:
    def open_with(root: Path, *, strict: bool) -> Workload:
        return open_image_folder(str(root), head=1000, preprocess=preprocess, limit=None, strict=strict, cache=None)

    return open_with


ONE_EACH = {Image.registered_extensions()[suffix]: suffix for suffix in sorted(suffixes(), reverse=True)}


@pytest.mark.parametrize("suffix", sampled(sorted(suffixes()), quick=[*ONE_EACH.values(), ".pfm"]))
def test_every_format_that_can_be_written_here_is_read_back(
    make_tree: MakeTree, open_folder: Open, suffix: str
) -> None:
    named = Image.registered_extensions()[suffix]
    if named not in Image.SAVE:
        pytest.skip(f"Pillow reads {named} and does not write it")
    root = make_tree(count=1)
    path = root / WNIDS[0] / f"picture{suffix}"
    noise((40, 36), seed=3, mode={".bw": "L", ".pgm": "L", ".pfm": "F"}.get(suffix, "RGB")).save(path, format=named)
    images = open_folder(root, strict=suffix != ".pfm")
    if suffix == ".pfm":  # floats, without an agreed range
        assert [kind_of(reason) for _, reason in images.skipped] == ["pixels without an agreed range"]
    else:
        assert f"{WNIDS[0]}/picture{suffix}" in images.ids


def test_everyday_formats_are_read_and_programs_videos_and_icons_are_not(
    make_tree: MakeTree, open_folder: Open
) -> None:
    assert {".avif", ".jfif", ".jpe", ".jp2", ".j2k", ".webp", ".tif", ".mpo"} <= suffixes()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".fli", ".wmf", ".ico", ".h5", ".fits", ".psd"} & suffixes()
    root = make_tree(count=1)
    noise((40, 36), seed=3).save(root / WNIDS[0] / "program.jpg", format="EPS")
    images = open_folder(root, strict=False)
    assert images.skipped == ((f"{WNIDS[0]}/program.jpg", problems.NOT_AN_IMAGE),), "no PostScript is run"
    assert "EPS" not in formats() and os.path.sep not in "".join(suffixes())
