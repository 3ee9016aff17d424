"""Decode images once, into one array that later opens map into memory without decoding anything.

The cache is two files: ``<key>.npy``, the pixels, and ``<key>.json``, what is in them, written last and therefore the
mark of a finished cache. The key covers the origin, each image's name and stamp (size and time of change for files),
and the preprocessing, so a changed image or another model's preprocessing never meets a stale array.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from ablations.workloads.base import Workload, WorkloadError, data_digest, pixel_digest
from ablations.workloads.preprocess import Preprocess

log = logging.getLogger(__name__)

_VERSION = 1  # part of every key: raise it whenever the same sources would give other pixels
_AHEAD = 64  # images decoded at once, so that memory stays small


@dataclass(frozen=True)
class Source:
    """One image that can be loaded: its name, a stamp that changes when its content may have, and how to load it."""

    id: str
    stamp: str
    load: Callable[[], tuple[Image.Image, int]]  # the decoded image and its label


@dataclass(frozen=True)
class Decoded:
    """What could be decoded, in the order of the sources."""

    pixels: np.ndarray  # (n, H, W, C) uint8
    labels: np.ndarray  # (n,) int64
    ids: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    pixels_sha256: str

    def workload(
        self,
        name: str,
        *,
        preprocess: Preprocess,
        labels: np.ndarray,
        classes: int,
        skipped: tuple[tuple[str, str], ...],
    ) -> Workload:
        """These images as a workload, with labels in the numbering of a head of ``classes`` classes."""
        digest = data_digest(
            self.pixels,
            labels=labels,
            ids=self.ids,
            mean=preprocess.mean,
            std=preprocess.std,
            pixels_sha256=self.pixels_sha256,
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
        )


@dataclass(frozen=True)
class _Row:
    id: str
    label: int
    pixels: np.ndarray | None  # None: could not be read, for the reason given
    reason: str = ""


def decode(
    sources: Sequence[Source],
    *,
    preprocess: Preprocess,
    cache: Path | None,
    origin: str,
    workers: int | None = None,
) -> Decoded:
    """Decode every source that can be read; the others are skipped with their reason.

    ``origin`` tells data sets apart in the cache; ``cache=None`` keeps the pixels in memory. ``workers`` is the number
    of decoding threads (Pillow decodes outside the interpreter's lock); 1 for loaders that are not thread-safe.
    """
    key = cache_key(sources, preprocess=preprocess, origin=origin)
    if cache is not None:
        found = _read(cache, key, preprocess)
        if found is not None:
            log.debug("%s: %d decoded images from %s", origin, len(found.ids), cache)
            return found
    log.info("%s: decoding %d images", origin, len(sources))
    workers = workers or min(8, os.cpu_count() or 1)
    rows = _rows(sources, preprocess, workers)
    if cache is None:
        return _collect(rows, origin)
    try:
        return _write(rows, cache=cache, key=key, preprocess=preprocess, origin=origin)
    except OSError as error:
        raise WorkloadError(
            f"the decoded images cannot be kept in {cache} ({error}): free some space or choose another OUT"
        ) from error


def cache_key(sources: Sequence[Source], *, preprocess: Preprocess, origin: str) -> str:
    """32 hex digits over all that decides the pixels."""
    content = {
        "version": _VERSION,
        "pillow": PIL.__version__,
        "origin": origin,
        "preprocess": preprocess.describe(),
        "sources": [[source.id, source.stamp] for source in sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def load_image(file: Path | BinaryIO) -> Image.Image:
    """Decode the first frame of an image file completely, or raise; Pillow's limit refuses decompression bombs."""
    with Image.open(file) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(
                f"{image.width} x {image.height} pixels, above the limit of {limit} (a decompression bomb?)"
            )
        return image.copy()  # loads, and outlives the file


def _decode_one(source: Source, preprocess: Preprocess) -> _Row:
    try:
        image, label = source.load()
        return _Row(source.id, label, preprocess(image))
    except UnidentifiedImageError:
        return _Row(source.id, -1, None, "not an image, or of an unknown format")
    except Exception as error:  # noqa: BLE001  a broken file can make a decoder raise nearly anything; the reason is reported
        return _Row(source.id, -1, None, str(error) or type(error).__name__)


def _rows(sources: Sequence[Source], preprocess: Preprocess, workers: int) -> Iterator[_Row]:
    if workers == 1:
        yield from (_decode_one(source, preprocess) for source in sources)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(sources), _AHEAD):
            yield from pool.map(lambda source: _decode_one(source, preprocess), sources[start : start + _AHEAD])


def _none_readable(skipped: Sequence[tuple[str, str]], origin: str) -> WorkloadError:
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
    return Decoded(pixels, labels, tuple(row.id for row in good), skipped, pixel_digest(pixels))


def _write(rows: Iterator[_Row], *, cache: Path, key: str, preprocess: Preprocess, origin: str) -> Decoded:
    """Write pixels as they are decoded, never holding them all; both files appear whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    ids: list[str] = []
    labels: list[int] = []
    skipped: list[tuple[str, str]] = []
    with _replacing(cache / f"{key}.npy") as file:
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
        if not ids:
            raise _none_readable(skipped, origin)
        file.seek(0)
        _write_header(file, len(ids), preprocess)  # the number of rows is known only now
        assert file.tell() == body, "numpy pads headers so that the first axis may grow"
    content = {"ids": ids, "labels": labels, "skipped": skipped, "pixels_sha256": digest.hexdigest()}
    with _replacing(cache / f"{key}.json") as file:
        file.write(json.dumps(content).encode())
    found = _read(cache, key, preprocess)
    assert found is not None, "what was just written can be read"
    return found


def _write_header(file: BinaryIO, count: int, preprocess: Preprocess) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *preprocess.shape)}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole; two writers at once do no harm."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    part = Path(name)
    part.chmod(0o644)  # mkstemp makes files that others of a shared cache cannot read
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _read(cache: Path, key: str, preprocess: Preprocess) -> Decoded | None:
    """A finished cache, or None where there is none or it is damaged (it is then made again)."""
    try:
        content = json.loads((cache / f"{key}.json").read_text())
        pixels = np.load(cache / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        decoded = Decoded(
            pixels=pixels,
            labels=np.array(content["labels"], dtype=np.int64),
            ids=tuple(content["ids"]),
            skipped=tuple((file, reason) for file, reason in content["skipped"]),
            pixels_sha256=content["pixels_sha256"],
        )
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("the decoded images in %s are damaged (%s): decoding again", cache, error)
        return None
    return decoded if pixels.shape == (len(decoded.ids), *preprocess.shape) else None
