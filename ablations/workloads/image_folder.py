"""Image folders: one folder a class, in ImageNet's layout or any other, or images beside a file of their labels.

Class indices come from the WordNet ids where the model knows them, never from the order of the folders, so any subset
of the 1000 classes can be evaluated. Where DATA holds splits (train, val, …), the validation split is taken: see
``splits``. What is read and what is passed over: see ``found``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ablations.workloads.account import Account, Entry
from ablations.workloads.base import NO_LABEL, Workload, refuse_or_keep, spread_subset
from ablations.workloads.classes import folder_classes
from ablations.workloads.decode import Loaded, Source, decode, read_image
from ablations.workloads.folders.copies import find_copies
from ablations.workloads.folders.found import find_all_images, find_images, image_id, printable
from ablations.workloads.folders.label_file import read_labels
from ablations.workloads.folders.splits import Place, find_place, unlabelled_place
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.reading import Reading

log = logging.getLogger(__name__)

Image = tuple[str, int, Path]  # id, class index, file


@dataclass(frozen=True)
class Labelled:
    """The images of a folder with their labels, sorted by id, and what was passed over."""

    images: list[Image]
    classes: int
    targets: Mapping[Path, str]  # where a file that is a link, or lies behind one, really is
    empty: tuple[str, ...]  # class folders without an image file
    folders: Mapping[str, list[Path]]  # class folder -> its image files
    skipped: tuple[Entry, ...]
    ignored: int
    label_file: str = ""
    lines: tuple[Entry, ...] = ()  # lines of the file that could not be used


def open_image_folder(
    data: str | None,
    *,
    head: int | None,
    preprocess: Preprocess,
    limit: int | None,
    strict: bool,
    cache: Path | None,
    name: str = "imagefolder",
    reading: Reading | None = None,
    labelled: bool = True,
) -> Workload:
    """Open a folder of images for a model whose head has ``head`` classes (None: random weights, any number).

    Without ``labelled`` every image below the folder counts, and none has a class.
    Files that are there twice count once, and not at all where their labels differ: see ``copies``.
    """
    reading = reading or Reading()
    if labelled:
        place = find_place(data, reading)
        found = labelled_images(place, head=head, reading=reading)
    else:
        place = Place(unlabelled_place(data, reading))
        found = unlabelled_images(place.folder, reading=reading)
    if strict:
        refuse_or_keep(found.lines, strict=True, name=str(place.labels))
    positions = spread_subset([image[0] for image in found.images], [image[1] for image in found.images], limit)
    chosen = [found.images[position] for position in positions]
    decoded = decode(
        [image_source(*image, target=found.targets.get(image[2])) for image in chosen],
        preprocess=preprocess,
        cache=cache,
        origin=str(place.folder),
        unwanted=lambda: find_copies(chosen),
    )
    skipped = refuse_or_keep([*found.skipped, *decoded.skipped], strict=strict, name=str(place.folder))
    account = Account(
        found=len(found.images) + len(found.skipped),
        used=len(decoded.ids),
        left_out=len(found.images) - len(chosen),
        notes=decoded.notes,
        empty_classes=tuple(sorted(map(printable, (*found.empty, *_emptied(found, place, decoded.skipped))))),
        ignored=found.ignored,
        links=len(found.targets),
        label_file=found.label_file,
        lines=found.lines,
    )
    if account.empty_classes:
        log.warning("%s: no image that can be used in %s", place.folder, ", ".join(account.empty_classes[:10]))
    return decoded.workload(
        name, preprocess=preprocess, labels=decoded.labels, classes=found.classes, skipped=skipped, account=account
    )


def labelled_images(place: Place, *, head: int | None, reading: Reading) -> Labelled:
    """Find the images and their labels: by class folders, or by the place's file."""
    root = place.folder
    if place.labels is None:
        found = find_images(root, links=reading.links)
        label_of, classes, empty = folder_classes(
            list(found.files), found.empty, head=head, where=str(root), rule=reading.rule
        )
        images = [(image_id(path, root), label_of[cls], path) for cls in label_of for path in found.files[cls]]
        return Labelled(sorted(images), classes, found.targets, empty, found.files, found.skipped, found.ignored)
    found = find_all_images(root, links=reading.links)
    paths = {image_id(path, root): path for path in found.files[""] if path != place.labels}
    said = read_labels(place.labels, list(paths), folder=root.name, head=head)
    log.info("%s: the labels of %d images are in %s", root, len(said.label_of), place.labels)
    return Labelled(
        sorted((name, label, paths[name]) for name, label in said.label_of.items()),
        said.classes,
        found.targets,
        (),
        {},
        (*found.skipped, *said.unusable),
        found.ignored,
        place.labels.name,
        said.problems,
    )


def unlabelled_images(root: Path, *, reading: Reading) -> Labelled:
    """Every image below a folder, whatever its folders mean."""
    found = find_all_images(root, links=reading.links)
    images = sorted((image_id(path, root), NO_LABEL, path) for path in found.files[""])
    return Labelled(images, 0, found.targets, (), {}, found.skipped, found.ignored)


def _emptied(found: Labelled, place: Place, skipped: tuple[Entry, ...]) -> list[str]:
    """Classes that have image files, but none that can be used."""
    useless = {name for name, _ in skipped}
    return [
        cls for cls, paths in found.folders.items() if all(image_id(path, place.folder) in useless for path in paths)
    ]


def image_source(name: str, label: int, path: Path, *, target: str | None = None) -> Source:
    """An image file of a folder, as ``decode`` takes it; ``target`` is where it is, if a link leads to it."""

    def load() -> Loaded:
        image, notes = read_image(path)
        return Loaded(image, label, notes)

    try:
        status = path.stat()
        stamp = f"{status.st_size}:{status.st_mtime_ns}:{label}"
    except OSError as error:  # loading will fail the same way, and be reported
        stamp = f"{error.strerror}:{label}"
    # a link may be turned to another file of the same size and time
    return Source(name, stamp if target is None else f"{stamp}:{printable(target)}", load)
