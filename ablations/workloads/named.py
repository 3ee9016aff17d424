"""Data sets by name: timm's, torchvision's and the hub's, turned into the same ``Workload`` as every other source.

Names are ``timm:SPEC`` (``timm.data.create_dataset``), ``torchvision:CLASS`` (``torchvision.datasets``) and
``hub:NAME`` (a Hugging Face data set), each with an optional ``@split``. What needs no network is tested
(``torchvision:FakeData``, and folders through timm); data sets that must be downloaded go the same way, but are not
verified.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torchvision
from PIL import Image

from ablations.records.files import user_path
from ablations.workloads.account import Account
from ablations.workloads.base import NO_LABEL, Workload, WorkloadError, refuse_or_keep, spread_subset
from ablations.workloads.classes import class_indices
from ablations.workloads.decode import Loaded, Source, decode, read_image
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import Unusable
from ablations.workloads.reading import Reading

log = logging.getLogger(__name__)

FAMILIES = ("timm", "torchvision", "hub")
_STREAMED = ("hfids/", "tfds/", "wds/")
_TORCHVISION_SPLITS = ("val", "test", "valid")  # the first the class accepts is taken


def open_named(
    name: str,
    *,
    data: str | None,
    head: int | None,
    preprocess: Preprocess,
    limit: int | None,
    strict: bool,
    cache: Path | None,
    download: bool = False,
    reading: Reading | None = None,
    labelled: bool = True,
) -> Workload:
    """Open a data set by name; ``data`` is the folder it is kept in, ``download=True`` lets torchvision fetch it.
    Without ``labelled`` its targets are not looked at, and no image has a class.
    """
    family, _, rest = name.partition(":")
    spec, _, split = rest.partition("@")
    if not spec:
        raise WorkloadError(f"the workload {name!r} names no data set: write {family}:NAME or {family}:NAME@SPLIT")
    reading = reading or Reading()
    _check_reading(reading, name)
    data = str(user_path(data)) if data else data
    dataset = _create(name, family=family, spec=spec, split=split, data=data, download=download)
    count = _length(dataset, name)
    ids = [_item_id(dataset, position) for position in range(count)]
    labels = (_known_labels(dataset) if labelled else None) or [0] * count
    chosen = spread_subset(ids, labels, limit)
    sources = [_source(dataset, position, ids[position], labelled=labelled) for position in chosen]
    known_as = name if labelled else f"{name} (unlabelled)"
    origin = f"{known_as} {user_path(data).resolve() if data else ''} {count} torchvision {torchvision.__version__}"
    behind = _behind(dataset, data, cache)
    origin = f"{origin} {behind}" if behind else origin
    # one thread: data sets are not promised to be thread-safe (FakeData sets the global seed)
    try:
        decoded = decode(sources, preprocess=preprocess, cache=cache, origin=origin, workers=1)
    finally:
        _close(dataset)
    skipped = refuse_or_keep(decoded.skipped, strict=strict, name=name)
    mapped, classes = decoded.labels, 0
    if labelled:
        mapped, classes = _map_labels(dataset, decoded.labels, head=head, name=name, rule=reading.rule)
    account = Account(
        found=count,
        used=len(decoded.ids),
        left_out=count - len(chosen),
        notes=decoded.notes,
        empty_classes=_empty_classes(dataset, decoded.labels) if labelled and len(chosen) == count else (),
    )
    return decoded.workload(
        name, preprocess=preprocess, labels=mapped, classes=classes, skipped=skipped, account=account
    )


def _check_reading(reading: Reading, name: str) -> None:
    if reading.file is not None:
        raise WorkloadError(
            f"{name} has labels of its own: leave LABELS={reading.labels} out, or use it with WORKLOAD=imagefolder"
        )
    if not reading.links:
        raise WorkloadError(
            f"{name} is read by timm or torchvision, which follow links: leave LINKS=no (--no-links) out, or use "
            "WORKLOAD=imagefolder"
        )


def _create(name: str, *, family: str, spec: str, split: str, data: str | None, download: bool) -> Any:
    if family == "torchvision":
        create: Callable[[], Any] = _torchvision(spec, split=split, data=data, download=download)
    else:
        if spec.lower().startswith(_STREAMED):
            raise WorkloadError(f"{name} is read as a stream, in no fixed order: use hub:NAME or an image folder")
        full = f"hfds/{spec}" if family == "hub" else spec
        create = _timm(full, split=split or "validation", data=data, download=download)
    try:
        return create()
    except WorkloadError:
        raise
    except ImportError as error:
        raise WorkloadError(f"{name} needs a package that is not installed ({error}): pip install datasets") from error
    except Exception as error:  # each data set fails in its own way (paths, splits, network); the reason is passed on
        raise WorkloadError(
            f"{name} cannot be opened ({type(error).__name__}: {error}). Check DATA, the folder it is kept in, "
            "and the split (NAME@SPLIT); a data set that is not there yet must be downloaded first (--download)"
        ) from error


def _timm(spec: str, *, split: str, data: str | None, download: bool) -> Callable[[], Any]:
    needs_folder = not spec.lower().startswith("hfds/")
    if needs_folder and not data:
        raise WorkloadError(f"timm:{spec} needs DATA=FOLDER, where the data set is or is to be kept")
    # timm's own name for a plain folder of classes is the empty one
    reader = "" if spec == "folder" else spec
    return lambda: timm.data.create_dataset(reader, root=data, split=split, download=download)


def _torchvision(spec: str, *, split: str, data: str | None, download: bool) -> Callable[[], Any]:
    names = [name for name in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, name))]
    if spec not in names:
        spelled = {name.lower(): name for name in names}
        near = [spelled[match] for match in difflib.get_close_matches(spec.lower(), spelled, n=3)]
        hint = f"did you mean {', '.join(near)}?" if near else "torchvision.datasets lists the names"
        raise WorkloadError(f"torchvision has no data set {spec!r}: {hint}")
    dataset = getattr(torchvision.datasets, spec)
    accepted = _accepted(dataset)
    common: dict[str, Any] = {}
    if "root" in accepted:
        if not data:
            raise WorkloadError(f"torchvision:{spec} needs DATA=FOLDER, where the data set is or is to be kept")
        common["root"] = data
    if "download" in accepted:
        common["download"] = download
    if "train" in accepted:
        common["train"] = split == "train"
    if "split" in accepted:
        return lambda: _first_split(dataset, common, (split,) if split else _TORCHVISION_SPLITS)
    if split and not ("train" in accepted and split in ("train", "test")):
        raise WorkloadError(f"torchvision:{spec} has no split {split!r}: leave @{split} out")
    return lambda: dataset(**common)


def _accepted(dataset: type) -> set[str]:
    """Names of the arguments a class takes, those it passes on to its base classes included."""
    names: set[str] = set()
    for cls in dataset.__mro__[:-1]:
        parameters = inspect.signature(cls).parameters
        names |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _first_split(dataset: Callable[..., Any], common: dict[str, Any], splits: Sequence[str]) -> Any:
    """The first split the class has: it refuses others with ValueError before it touches the disk."""
    problem: ValueError | None = None
    for split in splits:
        try:
            return dataset(**common, split=split)
        except ValueError as error:
            problem = error
    raise WorkloadError(f"{problem}. Name one of its splits after an @") from problem


def _length(dataset: Any, name: str) -> int:
    try:
        count = len(dataset)
    except TypeError as error:
        raise WorkloadError(
            f"{name} is read as a stream, in no fixed order: choose a data set of known size"
        ) from error
    if count == 0:
        raise WorkloadError(f"{name} holds no image: check DATA and the split")
    return count


def _item_id(dataset: Any, position: int) -> str:
    """The file's name where the data set tells it, else the position."""
    if hasattr(dataset, "reader"):
        inside = _archives(dataset, position)
        filename = dataset.filename(position)
        if filename:
            return "/".join([*inside, str(filename)])
    return f"{position:06d}"


def _known_labels(dataset: Any) -> list[int] | None:
    """Labels that are known without decoding, for spreading a subset over the classes."""
    reader = getattr(dataset, "reader", None)
    samples = getattr(reader, "samples", None)
    if isinstance(samples, list):
        targets: Any = [label for _, label in samples]
    else:  # timm's reader of archives keeps two arrays
        targets = getattr(reader if reader is not None else dataset, "targets", None)
    try:
        labels = [int(label) for label in (() if targets is None else targets)]
    except (TypeError, ValueError):  # no classes; loading says so
        return None
    return labels if len(labels) == len(dataset) else None


def _source(dataset: Any, position: int, name: str, *, labelled: bool) -> Source:
    def label(target: Any) -> int:
        return _label(target) if labelled else NO_LABEL

    def load() -> Loaded:
        if hasattr(dataset, "reader"):
            # not dataset[position], which puts another image in the place of one it cannot read
            file, target, *_ = dataset.reader[position]
            with file:
                pixels, notes = read_image(file, name=name)
            return Loaded(pixels, label(target), notes)
        image, target = dataset[position]
        return Loaded(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)), label(target))

    return Source(name, _stamp(dataset, position), load)


def _stamp(dataset: Any, position: int) -> str:
    samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
    if not isinstance(samples, list):
        return ""
    path, label = samples[position][:2]
    try:
        status = Path(path).stat()
    except (OSError, TypeError):
        return f"{label}"
    return f"{status.st_size}:{status.st_mtime_ns}:{label}"


def _archives(dataset: Any, position: int) -> list[str]:
    """The archives of a folder that an image lies in, from the outer to the inner: their files may have one name."""
    samples = getattr(dataset.reader, "samples", None)
    if not isinstance(samples, np.ndarray) or samples.ndim != 2 or samples.shape[1] != 3:
        return []
    _, outer, inner = samples[position]
    return [str(name) for name in (outer, getattr(inner, "name", None)) if name]


def _close(dataset: Any) -> None:
    """Close the archives that timm's reader keeps open; read again, it opens them again."""
    states = getattr(getattr(dataset, "reader", None), "tar_state", None)
    waiting = list(states.values()) if isinstance(states, dict) else [states] if states is not None else []
    while waiting:
        state = waiting.pop()
        waiting += state.children.values()
        if state.tf is not None:
            state.tf.close()
            state.reset()


def _behind(dataset: Any, data: str | None, cache: Path | None) -> str:
    """What changes when DATA does, for data sets whose images are no files: archives, tables, pickled arrays."""
    if data is None or _stamp(dataset, 0).count(":") == 2:
        return ""
    root = Path(data)
    within = [] if cache is None else [cache.resolve()]
    files = [root] if root.is_file() else [path for path in sorted(root.rglob("*")) if path.is_file()]
    digest = hashlib.sha256()
    for path in files:
        if not any(path.resolve().is_relative_to(own) for own in within):
            status = path.stat()
            about = f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(about.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _label(target: Any) -> int:
    try:
        return operator.index(target)
    except TypeError as error:
        raise Unusable(
            f"its target is a {type(target).__name__} and no class: only classification data sets can be evaluated"
        ) from error


def _class_names(dataset: Any) -> list[str] | None:
    """Class names in index order; WordNet ids where the data set has them."""
    reader = getattr(dataset, "reader", dataset)
    for attribute in ("wnids", "classes"):
        names = getattr(reader, attribute, None)
        if names is not None and all(isinstance(name, str) for name in names):
            return list(names)
    indices = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(indices, key=indices.__getitem__) if indices else None


def _numbers_folders(dataset: Any) -> bool:
    """Whether the numbering is no publisher's but the order in which somebody's folders happen to sort."""
    own = type(getattr(dataset, "reader", dataset)).__name__
    return own in ("ReaderImageFolder", "ReaderImageInTar", "ReaderImageTar", "ImageFolder", "DatasetFolder")


def _empty_classes(dataset: Any, labels: np.ndarray) -> tuple[str, ...]:
    """The classes that the data set names and has no image of that can be used."""
    present = set(labels.tolist())
    return tuple(name for index, name in enumerate(_class_names(dataset) or ()) if index not in present)


def _map_labels(
    dataset: Any, labels: np.ndarray, *, head: int | None, name: str, rule: str | None
) -> tuple[np.ndarray, int]:
    if labels.min() < 0:
        missing = int((labels < 0).sum())
        raise WorkloadError(
            f"{name} has {missing} images without a label: choose a split that has labels (NAME@SPLIT), "
            "or ask what needs none, TASK=embed (--task embed)"
        )
    names = _class_names(dataset)
    if names:
        indices, classes = class_indices(
            names, head=head, where=name, rule=rule, published=not _numbers_folders(dataset)
        )
        if labels.max() >= len(indices):
            raise WorkloadError(f"{name} has label {labels.max()}, but names only {len(indices)} classes")
        return indices[labels], classes
    classes = getattr(dataset, "num_classes", None) or int(labels.max()) + 1
    if head is not None and (classes > head or (hasattr(dataset, "num_classes") and classes != head)):
        raise WorkloadError(
            f"{name} has {classes} classes, but the model's head has {head}: "
            "choose a model (or WEIGHTS) trained on these classes"
        )
    if head is not None and classes < head:
        log.warning("%s does not name its classes: its labels are taken as the first %d of %d", name, classes, head)
    return labels, head or classes
