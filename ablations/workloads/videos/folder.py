"""Folders of clips in Kinetics' layout: one folder a class, in it videos, or folders of frames, each of them a clip.

Where DATA holds splits, the validation split is taken. Classes go by their names where the model knows these
(``abseiling``, ``air_drumming``), so that any subset of them can be evaluated; else by their order, as for images.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ablations.models.digits import VIDEOS as NAME
from ablations.workloads.account import Account, Entry
from ablations.workloads.base import NO_LABEL, Workload, WorkloadError, refuse_or_keep, spread_subset
from ablations.workloads.classes import folder_classes
from ablations.workloads.decode import Loaded, Source, decode, read_image
from ablations.workloads.folders.copies import find_copies
from ablations.workloads.folders.found import FoundImages, find_all_files, find_files, folders_in, image_id, printable
from ablations.workloads.folders.splits import EVALUATED_SPLITS, TRAINING_SPLITS, existing
from ablations.workloads.formats import suffixes
from ablations.workloads.problems import BAD_FRAME, BESIDE_CLIPS, SHORT, SIZES, Unusable, reason_of
from ablations.workloads.reading import Reading
from ablations.workloads.videos import reader
from ablations.workloads.videos.prepare import ClipPreprocess

log = logging.getLogger(__name__)

_BLANK = re.compile(r"[\s_-]+")


@dataclass(frozen=True)
class Clip:
    """A video, or a folder of frames."""

    id: str
    path: Path
    frames: tuple[Path, ...] = ()  # in the order of their names, numbers as numbers; none: a video


@dataclass(frozen=True)
class FoundClips:
    """The clips below a folder by class, and what was passed over."""

    clips: Mapping[str, list[Clip]]  # class name -> its clips; one class "" where classes are not looked at
    empty: tuple[str, ...]
    skipped: tuple[Entry, ...]
    files: FoundImages

    @property
    def videos(self) -> bool:
        """Whether some of them are decoded by PyAV."""
        return any(not clip.frames for clips in self.clips.values() for clip in clips)


def open_clips(
    data: str | None,
    *,
    head: int | None,
    names: Sequence[str] = (),
    prepare: ClipPreprocess,
    limit: int | None,
    strict: bool,
    cache: Path | None,
    reading: Reading | None = None,
    labelled: bool = True,
) -> Workload:
    """Open a folder of clips for a model whose head has ``head`` classes (None: random weights, any number), called
    ``names`` where the model says how.

    Without ``labelled`` every clip below the folder counts, and none has a class. Videos that are there twice count
    once, and not at all where their labels differ.

    Raises:
        WorkloadError: there is no clip, or its classes are not the model's.
    """
    reading = reading or Reading()
    if reading.file is not None:
        raise WorkloadError(
            "clips are labelled by their folders, one a class: leave LABELS=FILE (--labels) out, or say order or index"
        )
    root = evaluated_folder(existing(data, NAME), reading)
    found = find_clips(root, labelled=labelled, links=reading.links)
    if found.videos:
        reader.check_installed()
    label_of: dict[str, int] = {"": NO_LABEL}
    classes, empty = 0, tuple[str, ...]()
    if labelled:
        label_of, classes, empty = _classes(found, root, head=head, names=names, rule=reading.rule)
    entries = sorted((clip.id, label_of[cls], clip) for cls, clips in found.clips.items() for clip in clips)
    positions = spread_subset([entry[0] for entry in entries], [entry[1] for entry in entries], limit)
    chosen = [entries[position] for position in positions]
    targets = found.files.targets
    decoded = decode(
        [_source(clip, label, prepare, targets) for _, label, clip in chosen],
        preprocess=prepare,
        cache=cache,
        origin=str(root),
        unwanted=lambda: find_copies([(name, label, clip.path) for name, label, clip in chosen if not clip.frames]),
    )
    skipped = refuse_or_keep([*found.skipped, *decoded.skipped], strict=strict, name=str(root))
    useless = {name for name, _ in skipped}
    emptied = [cls for cls, clips in found.clips.items() if cls and all(clip.id in useless for clip in clips)]
    account = Account(
        found=len(entries) + len(found.skipped),
        used=len(decoded.ids),
        left_out=len(entries) - len(chosen),
        notes=decoded.notes,
        empty_classes=tuple(sorted(map(printable, (*empty, *emptied)))),
        ignored=found.files.ignored,
        links=len(targets),
    )
    if account.empty_classes:
        log.warning("%s: no clip that can be used in %s", root, ", ".join(account.empty_classes[:10]))
    return decoded.workload(
        NAME, preprocess=prepare, labels=decoded.labels, classes=classes, skipped=skipped, account=account,
        views=prepare.sampling.views,
    )  # fmt: skip


def evaluated_folder(root: Path, reading: Reading) -> Path:
    """DATA itself, or its validation split where all of its folders are splits."""
    folders = {folder.name.lower(): folder for folder in folders_in(root, links=reading.links)}
    if not folders or set(folders) - {*EVALUATED_SPLITS, *TRAINING_SPLITS}:
        return root
    for name in EVALUATED_SPLITS:
        if name in folders:
            log.info("%s holds splits: evaluating %s", root, folders[name].name)
            return folders[name]
    raise WorkloadError(
        f"DATA {root} holds only a training split: add a validation split, or name "
        f"DATA={next(iter(folders.values()))} if training clips are meant"
    )


# --- what is there ----------------------------------------------------------------------------------------------------


def find_clips(root: Path, *, labelled: bool = True, links: bool = True) -> FoundClips:
    """Every video and every folder of frames below each class folder; without ``labelled`` below ``root``.

    Raises:
        WorkloadError: there is none.
    """
    endings = reader.SUFFIXES | suffixes()
    files = (find_files if labelled else find_all_files)(root, endings, links=links)
    skipped = list(files.skipped)
    clips: dict[str, list[Clip]] = {}
    for cls, paths in files.files.items():
        top = root / cls if cls else root
        clips[cls] = [Clip(image_id(path, root), path) for path in paths if path.suffix.lower() in reader.SUFFIXES]
        frames: dict[Path, list[Path]] = defaultdict(list)
        for path in paths:
            if path.suffix.lower() not in reader.SUFFIXES:
                frames[path.parent].append(path)
        for folder, pictures in frames.items():
            if folder == top or any(clip.path.parent == folder for clip in clips[cls]):
                skipped += [(image_id(path, root), f"{BESIDE_CLIPS}: frames lie in a folder of their own")
                            for path in pictures]  # fmt: skip
            else:
                clips[cls].append(Clip(image_id(folder, root), folder, tuple(sorted(pictures, key=_natural))))
    emptied = [cls for cls, found in clips.items() if not found]
    some = {cls: found for cls, found in clips.items() if found}
    if not some:
        raise WorkloadError(_nothing(root, skipped))
    return FoundClips(some, (*files.empty, *(cls for cls in emptied if cls)), tuple(skipped), files)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() and len(part) < 20 else (-1, part) for part in parts]


def _nothing(root: Path, skipped: Sequence[Entry]) -> str:
    listed = "; ".join(f"{file}: {reason}" for file, reason in skipped[:3])
    passed = f" ({len(skipped)} skipped: {listed})" if skipped else ""
    return (
        f"{root} holds no clips{passed}: it needs one folder for each class, with videos in it "
        f"({', '.join(sorted(reader.SUFFIXES))}) or a folder of frames for each clip; without classes ask for "
        "features alone, TASK=embed (--task embed)"
    )


def _classes(
    found: FoundClips, root: Path, *, head: int | None, names: Sequence[str], rule: str | None
) -> tuple[dict[str, int], int, tuple[str, ...]]:
    """As ``folder_classes``; by the model's own names where it has one for every folder."""
    known = {_plain(name): index for index, name in enumerate(names)}
    used = list(found.clips)
    named = len(names) == len(known) and all(_plain(name) in known for name in used)
    if head is not None and rule is None and head == len(names) and named:
        empty = tuple(name for name in found.empty if _plain(name) in known)
        return {name: known[_plain(name)] for name in used}, head, empty
    return folder_classes(used, found.empty, head=head, where=str(root), rule=rule)


def _plain(name: str) -> str:
    """A class name without the marks in which folders and models differ."""
    return _BLANK.sub(" ", name).strip().casefold()


# --- one clip ---------------------------------------------------------------------------------------------------------


def _source(clip: Clip, label: int, prepare: ClipPreprocess, targets: Mapping[Path, str]) -> Source:
    def load() -> Loaded:
        pixels, notes = (_read_frames if clip.frames else _read_video)(clip, prepare)
        return Loaded(pixels, label, notes)

    stamps = [_stamp(path, targets) for path in clip.frames or (clip.path,)]
    return Source(clip.id, f"{';'.join(stamps)}:{label}", load)


def _stamp(path: Path, targets: Mapping[Path, str]) -> str:
    """What changes where a file does; a link may be turned to another of the same size and time."""
    try:
        status = path.stat()
        own = f"{status.st_size}:{status.st_mtime_ns}"
    except OSError as error:  # loading will fail the same way, and be reported
        own = f"{error.strerror}"
    target = targets.get(path)
    return f"{path.name}:{own}" if target is None else f"{path.name}:{own}:{printable(target)}"


def _read_video(clip: Clip, prepare: ClipPreprocess) -> tuple[np.ndarray, tuple[str, ...]]:
    return reader.read_video(clip.path, prepare)


def _read_frames(clip: Clip, prepare: ClipPreprocess) -> tuple[np.ndarray, tuple[str, ...]]:
    """The frames that are wanted, and no others: of a folder that is a clip. A note on several of them is said once."""
    wanted = prepare.places(len(clip.frames))
    crops: dict[int, np.ndarray] = {}
    notes: dict[str, None] = {}
    sizes = set()
    for place in sorted(set(wanted.flat)):
        path = clip.frames[place]
        try:
            image, unusual = read_image(path)
            crops[place] = prepare.crops(image)
        except Exception as error:  # a broken file can make a decoder raise nearly anything; the reason is reported
            raise Unusable(f"{BAD_FRAME}: {printable(path.name)}, {reason_of(error)}") from error
        sizes.add(image.size)
        notes.update(dict.fromkeys(unusual))
    if len(sizes) > 1:
        notes[f"{SIZES}: each is cut by itself"] = None
    if prepare.too_short(len(clip.frames)):
        notes[f"{SHORT}: {len(clip.frames)} frames, some are shown twice"] = None
    return prepare.clip(wanted, crops), tuple(notes)
