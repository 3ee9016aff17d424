"""Labels that folders' names give, and labels from a file: right, or refused, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder

from ablations.workloads import open_workload, problems
from ablations.workloads.base import WorkloadError
from ablations.workloads.classes import class_indices, folder_classes
from ablations.workloads.folders.label_file import read_labels
from ablations.workloads.named import open_named
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import kind_of
from ablations.workloads.reading import Reading
from tests.workloads.conftest import WNID_INDICES, WNIDS, MakeTree, Open, noise

WORDNET = ImageNetInfo().label_names()


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """DATA with three images directly in val/, as ILSVRC's archive unpacks, beside a training split."""
    (tmp_path / "data" / "train" / WNIDS[0]).mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    for number in (1, 2, 3):
        noise((40, 36), seed=number).save(tmp_path / "data" / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path / "data"


def name(number: int, ending: str = ".JPEG") -> str:
    return f"ILSVRC2012_val_{number:08d}{ending}"


def lines(*labels: object) -> str:
    return "".join(f"{name(number)} {label}\n" for number, label in enumerate(labels, start=1))


# -- names of folders


@pytest.mark.parametrize("width", [1, 3, 4])
def test_folders_named_0_to_999_are_indices_and_not_text(width: int) -> None:
    names = [f"{index:0{width}d}" for index in range(1000)]
    labels, classes, _ = folder_classes(sorted(names), (), head=1000, where="x")
    assert labels == {name: int(name) for name in names} and classes == 1000
    half, _, empty = folder_classes(sorted(names[::2]), sorted(names[1::2]), head=1000, where="x")
    assert half == {name: int(name) for name in names[::2]} and len(empty) == 500, "empty folders keep their numbers"


def test_wordnet_folders_count_as_timm_and_torchvision_number_them(make_tree: MakeTree) -> None:
    labels, _, _ = folder_classes(sorted(WORDNET), (), head=1000, where="x")
    assert labels == {wnid: index for index, wnid in enumerate(WORDNET)}
    root = make_tree(tuple(sorted(WORDNET)), count=0)
    for wnid in WORDNET:
        (root / wnid / "a.png").touch()
    assert ImageFolder(str(root)).class_to_idx == labels


@pytest.mark.parametrize(
    "names",
    [
        [f"class{index}" for index in range(1000)],
        [str(index) for index in range(1, 1001)],  # from one
        [*map(str, range(999)), "0998"],
        [*WORDNET[:999], "other"],
    ],
)
def test_a_thousand_strangers_are_refused_unless_their_order_is_said_to_be_the_heads(names: list[str]) -> None:
    with pytest.raises(WorkloadError, match=r"are no WordNet ids of the 1000 ImageNet classes.*LABELS=order"):
        folder_classes(names, (), head=1000, where="x")
    labels, classes, _ = folder_classes(names, (), head=1000, where="x", rule="order")
    assert sorted(labels.values()) == list(range(1000)) and classes == 1000


def test_the_order_is_that_of_the_sorted_folders_and_needs_as_many_as_the_head_has(
    make_tree: MakeTree, open_folder: Open
) -> None:
    root = make_tree(("bee", "ant", "cow"), count=1)
    images = open_folder(root, head=3, reading=Reading("order"))
    assert dict(zip(images.ids, images.labels.tolist(), strict=True)) == {
        "ant/image_00.png": 0, "bee/image_00.png": 1, "cow/image_00.png": 2,
    }  # fmt: skip
    with pytest.raises(WorkloadError, match=r"has 3 classes, but the model's head has 1000: LABELS=order"):
        open_folder(root, reading=Reading("order"))


def test_some_folders_named_by_index_count_where_that_is_said(make_tree: MakeTree, open_folder: Open) -> None:
    root = make_tree(("0", "0217", "701"), count=1)
    with pytest.raises(WorkloadError, match="say LABELS=index if they are indices of the head"):
        open_folder(root)
    assert open_folder(root, reading=Reading("index")).labels.tolist() == list(WNID_INDICES)
    (root / "1000").mkdir()
    noise((40, 40), seed=1).save(root / "1000" / "a.png")
    with pytest.raises(WorkloadError, match=r"indices 0\.\.999 .* 1 of 4 names are none \('1000'\)"):
        open_folder(root, reading=Reading("index"))


def test_folders_opened_by_name_are_held_to_the_same_rules(make_tree: MakeTree, preprocess: Preprocess) -> None:
    root = make_tree(tuple(f"{index:04d}" for index in range(1000)), count=0)
    picture = root.parent / "a.png"
    noise((40, 40), seed=1).save(picture)
    for folder in root.iterdir():
        (folder / "a.png").symlink_to(picture)
    options = {"head": 1000, "preprocess": preprocess, "limit": 3, "strict": True, "cache": None}
    for spec in ("timm:folder", "torchvision:ImageFolder"):
        assert len(open_named(spec, data=str(root), **options)) == 3  # type: ignore[arg-type]
    (root / "0999").rename(root / "other")
    for spec in ("timm:folder", "torchvision:ImageFolder"):
        with pytest.raises(WorkloadError, match="LABELS=order"):
            open_named(spec, data=str(root), **options)  # type: ignore[arg-type]
        open_named(spec, data=str(root), reading=Reading("order"), **options)  # type: ignore[arg-type]
    with pytest.raises(WorkloadError, match="has labels of its own"):
        open_named("timm:folder", data=str(root), reading=Reading("val.txt"), **options)  # type: ignore[arg-type]


def test_a_published_numbering_of_a_thousand_classes_stands() -> None:
    names = [f"words for {wnid}" for wnid in WORDNET]
    labels, _ = class_indices(names, head=1000, where="hub:x", published=True)
    assert labels.tolist() == list(range(1000))


def test_what_makes_its_own_labels_takes_none() -> None:
    options = {"data": None, "model": "digits_vit_tiny", "limit": 2, "strict": False, "cache": None}
    with pytest.raises(WorkloadError, match="leave LABELS and LINKS"):
        open_workload("embedded", reading=Reading("order"), **options)  # type: ignore[arg-type]


# -- labels in a file


@pytest.mark.parametrize("place", ["data", "data/val"])
@pytest.mark.parametrize("form", ["index", "wordnet", "kaggle"])
def test_a_flat_validation_folder_gets_its_labels_from_the_file_beside_it(
    flat: Path, open_folder: Open, place: str, form: str
) -> None:
    text = {"index": lines(*WNID_INDICES), "wordnet": lines(*WNIDS), "kaggle": "ImageId,PredictionString\n"}[form]
    if form == "kaggle":  # objects follow one another; the first says the class
        rows = enumerate(WNIDS, start=1)
        text += "".join(f"{name(number, '')},{wnid} 1 2 3 4 n01440764 5 6 7 8 \n" for number, wnid in rows)
    file = flat.parent / place / ("LOC_val_solution.csv" if form == "kaggle" else "val.txt")
    file.write_text(text)
    images = open_folder(flat)
    assert images.ids == tuple(name(number) for number in (1, 2, 3)) and images.classes == 1000
    assert images.labels.tolist() == list(WNID_INDICES)
    assert images.account is not None and images.account.as_data(())["label_file"] == file.name
    explicit = open_folder(flat / "val", reading=Reading(str(file)))
    assert explicit.digest == images.digest
    file.write_text(text.replace(str(WNID_INDICES[1]), "5").replace(WNIDS[1], WORDNET[5]))
    assert open_folder(flat).digest != images.digest


def test_two_files_of_labels_are_not_chosen_from(flat: Path, open_folder: Open) -> None:
    (flat / "val.txt").write_text(lines(1, 2, 3))
    (flat / "val" / "val.txt").write_text(lines(1, 2, 4))
    with pytest.raises(WorkloadError, match=r"val\.txt and in .*val\.txt: say which count with LABELS=FILE"):
        open_folder(flat)
    assert open_folder(flat, reading=Reading(str(flat / "val.txt"))).labels.tolist() == [1, 2, 3]


def test_the_same_labels_as_from_class_folders(make_tree: MakeTree, open_folder: Open) -> None:
    root = make_tree()
    plain = open_folder(root)
    file = root.parent / "labels.txt"
    file.write_text("".join(f"data/{image} {label}\n" for image, label in zip(plain.ids, plain.labels, strict=True)))
    assert open_folder(root, reading=Reading(str(file))).digest == plain.digest


def test_lines_that_cannot_be_used_are_named_and_counted(flat: Path, open_folder: Open, caplog) -> None:
    noise((40, 36), seed=9).save(flat / "secret.JPEG")
    (flat / "val.txt").write_text(
        f"{name(1)} 5\n\n{name(2)}\n{name(2)} tench\n{name(1)} 5\n{name(3)} 7\n{name(3)} 8\n{name(4)} 9\n"
        "../secret.JPEG 3\n/etc/passwd 3\n"
    )
    images = open_folder(flat, strict=False)
    assert (images.ids, images.labels.tolist()) == ((name(1),), [5])
    assert {file: kind_of(reason) for file, reason in images.skipped} == {
        name(2): problems.NO_LABEL, name(3): problems.TWO_LABELS,
    }  # fmt: skip
    assert images.account is not None
    counts = images.account.as_data(images.skipped)
    assert counts["label_lines"] == {
        problems.BROKEN_LINE: 2, problems.ESCAPE: 2, problems.REPEATED: 1, problems.NO_IMAGE: 1,
    }  # fmt: skip
    assert (counts["found"], counts["used"]) == (3, 1) and "val.txt:3: a line without a name and a label" in caplog.text
    with pytest.raises(WorkloadError, match=r"6 image\(s\) cannot be used \(val\.txt:3"):
        open_folder(flat, strict=True)


@pytest.mark.parametrize(
    ("labels", "head", "message"),
    [
        ((1, 2, 1000), 1000, r"1 of 3 labels are outside 0\.\.999, .*the first: line 3, .*_00000003\.JPEG has 1000"),
        ((1, 2, 3), 3, r"run from 1: subtract one"),
        ((-1, 2, 3), 1000, r"line 1, .* has -1"),
        (("n99999999", 1, 2), 1000, r"has n99999999"),
        ((WNIDS[0], 1, 2), 10, r"none of ImageNet's, so WordNet ids mean nothing"),
    ],
)
def test_labels_outside_the_head_are_refused(
    flat: Path, open_folder: Open, labels: tuple[object, ...], head: int, message: str
) -> None:
    (flat / "val.txt").write_text(lines(*labels))
    with pytest.raises(WorkloadError, match=message):
        open_folder(flat, head=head)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no line that can be read"), (b"\xff\xfe\x00", "is no text of labels"),
        (b"other_1.JPEG 3\n", "labels none of the 3 images"), (b"a\x00b 1\n", "labels none of the 3 images"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_file_of_labels_is_refused(
    flat: Path, open_folder: Open, content: bytes, message: str
) -> None:
    (flat / "val.txt").write_bytes(content)
    with pytest.raises(WorkloadError, match=message):
        open_folder(flat)
    with pytest.raises(WorkloadError, match=r"none\.txt is no file"):
        open_folder(flat, reading=Reading("none.txt"))


def test_names_that_fit_two_images_name_none(tmp_path: Path) -> None:
    file = tmp_path / "val.txt"
    file.write_text("a/x.png 1\nx.png 2\ny 3\n")
    found = read_labels(file, ["a/x.png", "b/x.png", "b/y.png"], folder="val", head=10)
    assert found.label_of == {"a/x.png": 1, "b/y.png": 3}
    assert [kind_of(what) for _, what in found.problems] == [problems.NO_IMAGE]


# -- what is said of a folder is so


def folder_of(kind: str, path: Path) -> None:
    path.mkdir(parents=True)
    if kind == "classes":
        (path / WNIDS[0]).mkdir()
        noise((40, 36), seed=len(path.name)).save(path / WNIDS[0] / "a.png")
    if kind == "images":
        noise((40, 36), seed=7).save(path / "a.png")


@pytest.mark.parametrize(
    ("folders", "links", "message"),
    [
        ({"train": "classes"}, True, r"holds only a training split: .* DATA=.*/train if"),
        ({"train": "classes", "val": "images"}, True, r"val/ holds images directly: .*LABELS=FILE"),
        ({"train": "classes", "val": "empty"}, True, r"val/ holds neither class folders nor images"),
        ({"train": "classes", "val": "link"}, False, r"val/ is a link, .* run without --no-links"),
        ({"val": "images"}, True, r"val/ holds images directly: .*LABELS=FILE"),
        ({"train": "images", "val": "images"}, True, r"Or are 'train', 'val' splits\? .*LABELS=FILE"),
        ({"out": "images", "val": "images"}, True, r"Or is one of 'val' what to evaluate\? .*DATA=.*/val$"),
        ({"one": "images"}, True, r"head of 1 class$"),
    ],
)
def test_a_folder_that_cannot_be_evaluated_is_told_what_it_lacks(
    tmp_path: Path, open_folder: Open, folders: dict[str, str], links: bool, message: str
) -> None:
    folder_of("classes", tmp_path / "pool")
    (tmp_path / "data").mkdir()
    for called, kind in folders.items():
        if kind == "link":
            (tmp_path / "data" / called).symlink_to(tmp_path / "pool")
        else:
            folder_of(kind, tmp_path / "data" / called)
    with pytest.raises(WorkloadError, match=message):
        open_folder(tmp_path / "data", reading=Reading(links=links))


def test_what_lies_beside_splits_and_holds_no_image_is_no_class(tmp_path: Path, open_folder: Open) -> None:
    folder_of("classes", tmp_path / "data" / "train")
    folder_of("classes", tmp_path / "data" / "val")
    (tmp_path / "data" / "devkit" / "data").mkdir(parents=True)
    assert open_folder(tmp_path / "data").ids == (f"{WNIDS[0]}/a.png",)


def test_a_link_in_place_of_data_that_leads_nowhere_is_called_so(tmp_path: Path, open_folder: Open) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(WorkloadError, match="is a link that leads nowhere"):
        open_folder(tmp_path / "gone")
    with pytest.raises(WorkloadError, match="is a link in a circle"):
        open_folder(tmp_path / "loop")
