"""Decode images once, into one array that later opens map into memory without decoding anything.

The cache is two files: ``<key>.npy``, the pixels, and ``<key>.json``, what is in them, written last and therefore the
mark of a finished cache. The key covers the origin, each image's name and stamp (size and time of change for files),
and the preprocessing, so a changed image or another model's preprocessing never meets a stale array.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import PIL
from PIL import Image

from ablations.records.files import atomic
from ablations.system import cores
from ablations.workloads.account import Account, Entry
from ablations.workloads.base import Workload, WorkloadError, data_digest, pixel_digest
from ablations.workloads.formats import formats
from ablations.workloads.problems import UNREADABLE, kind_of, notes_on_frames, notes_on_pixels, reason_of, refuse_size

log = logging.getLogger(__name__)

_VERSION = 3  # part of every key: raise it whenever the same sources would give other pixels
_AHEAD = 64  # images decoded at once, so that memory stays small


class Prepare(Protocol):
    """What makes an image's pixels of what its source has loaded: ``Preprocess``, or of a clip ``ClipPreprocess``."""

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def describe(self) -> dict[str, Any]: ...

    def __call__(self, image: Any, /) -> np.ndarray: ...


class Loaded(NamedTuple):
    """A decoded image (or the array of a clip), its label, and what is unusual about it: see ``problems``."""

    image: Image.Image | np.ndarray
    label: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One image that can be loaded: its name, a stamp that changes when its content may have, and how to load it."""

    id: str
    stamp: str
    load: Callable[[], Loaded]


@dataclass(frozen=True)
class Decoded:
    """What could be decoded, in the order of the sources."""

    pixels: np.ndarray  # (n, H, W, C) uint8, of clips (n, views · F, H, W, C)
    labels: np.ndarray  # (n,) int64
    ids: tuple[str, ...]
    skipped: tuple[Entry, ...]  # (id, reason)
    notes: tuple[Entry, ...]  # (id, what is unusual about an image that is read all the same)
    pixels_sha256: str

    def workload(
        self,
        name: str,
        *,
        preprocess: Prepare,
        labels: np.ndarray,
        classes: int,
        skipped: tuple[Entry, ...],
        account: Account | None = None,
        views: int = 1,
    ) -> Workload:
        """These images as a workload, with labels in the numbering of a head of ``classes`` classes."""
        digest = data_digest(
            self.pixels,
            labels=labels,
            ids=self.ids,
            mean=preprocess.mean,
            std=preprocess.std,
            pixels_sha256=self.pixels_sha256,
            views=views,
        )
        return Workload(
            name=name,
            pixels=self.pixels,
            labels=labels,
            ids=self.ids,
            mean=preprocess.mean,
            std=preprocess.std,
            classes=classes,
            digest=digest,
            skipped=skipped,
            account=account,
            views=views,
        )


@dataclass(frozen=True)
class _Row:
    id: str
    label: int
    pixels: np.ndarray | None  # None: could not be read, for the reason given
    reason: str = ""
    notes: tuple[str, ...] = ()


def decode(
    sources: Sequence[Source],
    *,
    preprocess: Prepare,
    cache: Path | None,
    origin: str,
    workers: int | None = None,
    unwanted: Callable[[], Mapping[str, str]] | None = None,
) -> Decoded:
    """Decode every source that can be read; the others are skipped with their reason.

    ``origin`` tells data sets apart in the cache; ``cache=None`` keeps the pixels in memory. ``workers`` is the number
    of decoding threads (Pillow decodes outside the interpreter's lock); 1 for loaders that are not thread-safe.
    ``unwanted`` says of some ids why they must not count; it is asked once, where nothing is in the cache yet.
    """
    key = cache_key(sources, preprocess=preprocess, origin=origin)
    if cache is not None:
        found = _read(cache, key, preprocess)
        if found is not None and not _recovered(found, sources):
            log.debug("%s: %d decoded images from %s", origin, len(found.ids), cache)
            return found
    log.info("%s: decoding %d images", origin, len(sources))
    workers = workers or min(8, cores())
    rows = _rows(sources, preprocess, workers, unwanted() if unwanted is not None else {})
    if cache is None:
        return _collect(rows, origin)
    try:
        return _write(rows, cache=cache, key=key, preprocess=preprocess, origin=origin)
    except OSError as error:
        raise WorkloadError(
            f"the decoded images cannot be kept in {cache} ({error}): free some space or choose another OUT"
        ) from error


def cache_key(sources: Sequence[Source], *, preprocess: Prepare, origin: str) -> str:
    """32 hex digits over all that decides the pixels."""
    content = {
        "version": _VERSION,
        "pillow": PIL.__version__,
        "origin": origin,
        "preprocess": preprocess.describe(),
        "sources": [[source.id, source.stamp] for source in sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def read_image(file: Path | BinaryIO, *, name: str = "") -> tuple[Image.Image, tuple[str, ...]]:
    """Decode the first frame of an image file completely, or raise: the image, and what is unusual about it.

    What would fill the memory is refused before it is decoded, and what is no picture is not opened: see ``formats``.
    ``name`` is the file's, where that is known otherwise.
    """
    with Image.open(file, formats=formats()) as image:
        refuse_size(image)
        notes = notes_on_pixels(image, name or (file.name if isinstance(file, Path) else ""))
        decoded = image.copy()  # loads, and outlives the file
        return decoded, (*notes, *notes_on_frames(image))


def load_image(file: Path | BinaryIO) -> Image.Image:
    """The image of ``read_image`` alone."""
    return read_image(file)[0]


def _decode_one(source: Source, preprocess: Prepare) -> _Row:
    try:
        image, label, notes = source.load()
        return _Row(source.id, label, preprocess(image), notes=notes)
    except Exception as error:  # noqa: BLE001  a broken file can make a decoder raise nearly anything; the reason is reported
        return _Row(source.id, -1, None, reason_of(error))


def _rows(sources: Sequence[Source], preprocess: Prepare, workers: int, unwanted: Mapping[str, str]) -> Iterator[_Row]:
    def row(source: Source) -> _Row:
        reason = unwanted.get(source.id)
        return _decode_one(source, preprocess) if reason is None else _Row(source.id, -1, None, reason)

    if workers == 1:
        yield from map(row, sources)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(sources), _AHEAD):
            yield from pool.map(row, sources[start : start + _AHEAD])


def _none_readable(skipped: Sequence[Entry], origin: str) -> WorkloadError:
    listed = "; ".join(f"{file}: {reason}" for file, reason in skipped[:5])
    return WorkloadError(f"{origin}: none of {len(skipped)} images can be read ({listed}): check that DATA is complete")


def _collect(rows: Iterator[_Row], origin: str) -> Decoded:
    all_rows = list(rows)
    good = [row for row in all_rows if row.pixels is not None]
    skipped = tuple((row.id, row.reason) for row in all_rows if row.pixels is None)
    if not good:
        raise _none_readable(skipped, origin)
    pixels = np.stack([row.pixels for row in good if row.pixels is not None])
    labels = np.array([row.label for row in good], dtype=np.int64)
    notes = tuple((row.id, note) for row in good for note in row.notes)
    return Decoded(pixels, labels, tuple(row.id for row in good), skipped, notes, pixel_digest(pixels))


def _write(rows: Iterator[_Row], *, cache: Path, key: str, preprocess: Prepare, origin: str) -> Decoded:
    """Write pixels as they are decoded, never holding them all; both files appear whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    ids: list[str] = []
    labels: list[int] = []
    skipped: list[Entry] = []
    notes: list[Entry] = []
    with atomic(cache / f"{key}.npy") as whole, whole.open("wb") as file:
        _write_header(file, 0, preprocess)
        body = file.tell()
        for row in rows:
            if row.pixels is None:
                skipped.append((row.id, row.reason))
                continue
            data = np.ascontiguousarray(row.pixels).data
            digest.update(data)
            file.write(data)
            ids.append(row.id)
            labels.append(row.label)
            notes += [(row.id, note) for note in row.notes]
        if not ids:
            raise _none_readable(skipped, origin)
        file.seek(0)
        _write_header(file, len(ids), preprocess)  # the number of rows is known only now
        assert file.tell() == body, "numpy pads headers so that the first axis may grow"
    about = {"ids": ids, "labels": labels, "skipped": skipped, "notes": notes}
    content = {**about, "pixels_sha256": digest.hexdigest()}
    with atomic(cache / f"{key}.json") as whole:
        whole.write_text(json.dumps({**content, "sha256": _digest(content)}), encoding="utf-8")
    found = _read(cache, key, preprocess)
    assert found is not None, "what was just written can be read"
    return found


def _write_header(file: BinaryIO, count: int, preprocess: Prepare) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *preprocess.shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _read(cache: Path, key: str, preprocess: Prepare) -> Decoded | None:
    """A finished cache, or None where there is none or it is damaged (it is then made again)."""
    try:
        content = json.loads((cache / f"{key}.json").read_text(encoding="utf-8"))
        if content.pop("sha256") != _digest(content):
            raise ValueError("their names or labels are not what was written")
        pixels = np.load(cache / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        decoded = Decoded(
            pixels=pixels,
            labels=np.array(content["labels"], dtype=np.int64),
            ids=tuple(content["ids"]),
            skipped=tuple((file, reason) for file, reason in content["skipped"]),
            notes=tuple((file, note) for file, note in content["notes"]),
            pixels_sha256=content["pixels_sha256"],
        )
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  # a damaged header can make numpy raise nearly anything
        log.warning("the decoded images in %s are damaged (%s): decoding again", cache, error)
        return None
    if pixels.shape != (len(decoded.ids), *preprocess.shape):
        return None
    if pixel_digest(pixels) != decoded.pixels_sha256:  # their name stands in for them: they must be what it says
        log.warning("the decoded images in %s are no longer what they were: decoding again", cache)
        return None
    return decoded


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _recovered(found: Decoded, sources: Sequence[Source]) -> bool:
    """Whether an image that the system would not give last time can be read now: nothing about the file tells.

    Permissions and disks are mended without changing a file's size or time, which is all that a stamp knows.
    """
    refused = {name for name, reason in found.skipped if kind_of(reason) == UNREADABLE}
    return any(_loads(source) for source in sources if source.id in refused)


def _loads(source: Source) -> bool:
    try:
        source.load()
    except Exception as error:  # noqa: BLE001  whatever a decoder raises, the system did give the file
        return kind_of(reason_of(error)) != UNREADABLE
    return True
