"""Files that are there twice: found whatever they are called, and nothing else is taken for one."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.workloads.folders.copies import find_copies
from ablations.workloads.image_folder import open_image_folder
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import CONTRADICTION, COPY, kind_of
from tests.workloads.conftest import WNID_INDICES, WNIDS, MakeTree


def opened(root: Path, preprocess: Preprocess, **options):
    default = {"head": 1000, "limit": None, "strict": False, "cache": None}
    return open_image_folder(str(root), preprocess=preprocess, **{**default, **options})


def test_within_a_class_the_first_of_several_copies_stays(make_tree: MakeTree, preprocess: Preprocess) -> None:
    root = make_tree(count=2)
    original = root / WNIDS[1] / "image_00.png"
    (root / WNIDS[1] / "z.jpg").write_bytes(original.read_bytes())
    os.link(original, root / WNIDS[1] / "zz.png")
    images = opened(root, preprocess)
    said = f"{COPY}: the same file as {WNIDS[1]}/image_00.png"
    assert images.skipped == ((f"{WNIDS[1]}/z.jpg", said), (f"{WNIDS[1]}/zz.png", said))
    assert images.digest == opened(make_tree(count=2, name="clean"), preprocess).digest


def test_a_file_in_two_classes_counts_in_neither(make_tree: MakeTree, preprocess: Preprocess) -> None:
    root = make_tree(count=2)
    (root / WNIDS[2] / "b.png").write_bytes((root / WNIDS[0] / "image_01.png").read_bytes())
    images = opened(root, preprocess)
    reasons = dict(images.skipped)
    assert set(reasons) == {f"{WNIDS[0]}/image_01.png", f"{WNIDS[2]}/b.png"}
    assert {kind_of(reason) for reason in reasons.values()} == {CONTRADICTION}
    assert f"{WNIDS[2]}/b.png holds the same bytes" in reasons[f"{WNIDS[0]}/image_01.png"]
    assert len(images) == 5 and set(images.labels.tolist()) == set(WNID_INDICES)


def test_the_cache_remembers_the_copies(make_tree: MakeTree, preprocess: Preprocess, tmp_path: Path) -> None:
    root = make_tree(count=2)
    (root / WNIDS[0] / "again.png").write_bytes((root / WNIDS[0] / "image_01.png").read_bytes())
    first, second = (opened(root, preprocess, cache=tmp_path / "cache") for _ in range(2))
    assert first.skipped == second.skipped and len(second.skipped) == 1
    (root / WNIDS[0] / "again.png").unlink()
    assert opened(root, preprocess, cache=tmp_path / "cache").skipped == ()


def test_files_that_are_empty_or_gone_are_copies_of_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    entries = [(name, 0, tmp_path / name) for name in ("a", "b", "gone", "gone as well")]
    assert find_copies(entries) == {}


# contents that differ in length, at the end, at the beginning alone, or not at all; longer than what is read first
CONTENTS = [b"x", b"y", b"xy", bytes(5000), b"\1" + bytes(4999), bytes(4999) + b"\1", bytes(5001), b"\1" + bytes(9999)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(range(len(CONTENTS))), st.integers(0, 2)), max_size=8))
def test_copies_are_those_that_comparing_all_with_all_finds(files: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entries = []
        for number, (content, label) in enumerate(files):
            path = Path(folder) / f"{number}"
            path.write_bytes(CONTENTS[content])
            entries.append((f"{label}/{number}", label, path))
        found = find_copies(list(reversed(entries)))
    groups = defaultdict(list)
    for (content, _), entry in zip(files, entries, strict=True):
        groups[content].append(entry)
    expected = {}
    for group in groups.values():
        if len({label for _, label, _ in group}) > 1:
            expected.update({name: CONTRADICTION for name, _, _ in group})
        else:
            expected.update(dict.fromkeys(sorted(name for name, _, _ in group)[1:], COPY))
    assert {name: kind_of(reason) for name, reason in found.items()} == expected
