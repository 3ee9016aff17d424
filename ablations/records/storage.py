"""Where result files are: a folder, or a place that pyarrow knows by a URI such as ``s3://bucket/runs/a``.

Names are relative to that place, with slashes: ``trials/0123456789abcdef.parquet``. A file appears whole or not at all:
on a disk through a temporary file beside it, in an object store because an object exists once its upload is complete.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from ablations.records.files import atomic, user_path

_OBJECT_STORES = ("s3", "gcs", "abfs")  # what is written there is not visible before it is whole
_LEFT_OVER = 3600.0  # seconds after which nobody writes to a temporary file any more
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows knows no quota


class StoreError(OSError):
    """The results cannot be kept where they should go."""


@dataclass(frozen=True)
class Entry:
    """A file as its folder lists it: enough to notice that it is no longer the one that was read."""

    size: int  # bytes
    modified: int  # nanoseconds, by the clock of the storage


class Storage(ABC):
    """Files below one place."""

    location: str
    """The place as a person writes it, and as another process finds it."""

    @abstractmethod
    def make(self, *folders: str) -> None:
        """Make folders, where the storage has such a thing."""

    @abstractmethod
    def entries(self, folder: str) -> dict[str, Entry]:
        """The files of a folder by name; {} where there is no such folder."""

    @abstractmethod
    def entry(self, name: str) -> Entry | None:
        """One file, or None."""

    @abstractmethod
    def open(self, name: str) -> Any:
        """A file to read from wherever in it, as pyarrow takes it."""

    @abstractmethod
    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Put a whole file there, in place of an earlier one."""

    def append(self, name: str, content: bytes) -> bool:
        """Add to the end of a file, now; False where the storage has whole files only, and nothing was done."""
        return False

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def dataset(self, names: list[str]) -> tuple[list[str], Any]:
        """(paths, file system) of files as ``pyarrow.dataset`` takes them."""

    def below(self, name: str) -> str:
        """The location of a file or folder of this place."""
        place, mark, query = self.location.partition("?")
        return f"{place.rstrip('/')}/{name}{mark}{query}"

    def read(self, name: str) -> bytes:
        """The bytes of a file; FileNotFoundError where there is none."""
        with self.open(name) as file:
            content: bytes = file.read()
        return content


class Disk(Storage):
    """A folder of this machine, or one on a disk that several machines share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def make(self, *folders: str) -> None:
        for folder in folders:
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def entries(self, folder: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        try:
            with os.scandir(self.root / folder) as listed:
                for each in listed:
                    if not each.name.startswith("."):  # temporary, of a writer at work
                        with suppress(FileNotFoundError):  # gone since it was listed
                            about = each.stat()
                            found[each.name] = Entry(about.st_size, about.st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def entry(self, name: str) -> Entry | None:
        try:
            about = (self.root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(about.st_size, about.st_mtime_ns)

    def open(self, name: str) -> Any:
        return pa.OSFile(str(self.root / name))

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        with atomic(self.root / name) as temporary:
            temporary.write_bytes(content)

    def append(self, name: str, content: bytes) -> bool:
        with (self.root / name).open("ab") as file:
            file.write(content)
        return True

    def move(self, name: str, to: str) -> None:
        (self.root / name).replace(self.root / to)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def dataset(self, names: list[str]) -> tuple[list[str], Any]:
        return [str(self.root / name) for name in names], pafs.LocalFileSystem()

    def remove_left_overs(self, folders: Iterable[str], *, now: float) -> None:
        """Remove temporary files that only a killed run can have left; ``now`` by the clock that dated them."""
        for folder in folders:
            for path in (self.root / folder).glob(".*.tmp"):
                with suppress(OSError):
                    if now - path.stat().st_mtime > _LEFT_OVER:
                        path.unlink()


class Remote(Storage):
    """A place that a pyarrow file system reaches: S3 and what speaks like it, Google's, Azure's, HDFS."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.filesystem, path = _file_system(self.location)
        self.root = PurePosixPath(path)

    def make(self, *folders: str) -> None:
        if self.filesystem.type_name not in _OBJECT_STORES:  # there, folders are only parts of names
            for folder in folders:
                self.filesystem.create_dir(self._path(folder), recursive=True)

    def entries(self, folder: str) -> dict[str, Entry]:
        selector = pafs.FileSelector(self._path(folder), allow_not_found=True)
        listed = self.filesystem.get_file_info(selector)
        return {each.base_name: _entry(each) for each in listed if each.type == pafs.FileType.File}

    def entry(self, name: str) -> Entry | None:
        about = self.filesystem.get_file_info(self._path(name))
        return _entry(about) if about.type == pafs.FileType.File else None

    def open(self, name: str) -> Any:
        return self.filesystem.open_input_file(self._path(name))

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        direct = self.filesystem.type_name in _OBJECT_STORES
        path = self._path(name if direct else f"{name}.{os.getpid()}.tmp")
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)
        if not direct:
            self.filesystem.move(path, self._path(name))

    def move(self, name: str, to: str) -> None:
        self.filesystem.move(self._path(name), self._path(to))

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self._path(name))

    def dataset(self, names: list[str]) -> tuple[list[str], Any]:
        return [self._path(name) for name in names], self.filesystem

    def _path(self, name: str) -> str:
        return str(self.root / name)


def is_uri(out: Path | str) -> bool:
    """Whether results go through a file system of pyarrow's, as ``s3://…`` says."""
    return isinstance(out, str) and "://" in out and not out.startswith("file://")


def open_storage(out: Path | str) -> Storage:
    """The storage of a folder or a URI; nothing is read or written yet."""
    if is_uri(out):
        return Remote(str(out))
    return Disk(as_folder(out).absolute())


def as_folder(out: Path | str) -> Path:
    """The folder of what is no URI, written as a path or as ``file://…``."""
    text = str(out)
    return user_path(urlsplit(text).path if text.startswith("file://") else text)


def reason(error: OSError) -> str:
    """Why storage refused, in a line: pyarrow's own messages are long."""
    text = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return text[:300]


def refused(location: str, error: OSError) -> StoreError:
    """What a failed write means, and what to do."""
    if isinstance(error, StoreError):
        return error
    remedy = (
        "free some space there, then run the same command again: nothing that is finished is lost"
        if error.errno in FULL
        else "choose another place with --out, or make this one writable"
    )
    found = StoreError(f"the results cannot be written to {location} ({reason(error)}); {remedy}")
    found.errno = error.errno
    return found


def _file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    parts = urlsplit(uri)
    try:
        if parts.scheme == "s3" and not {"region", "endpoint_override"} & set(parse_qs(parts.query)):
            return _s3(parts.netloc, parts.path)
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (ValueError, NotImplementedError, OSError) as error:
        raise StoreError(
            f"{uri} cannot be opened ({reason(OSError(str(error)))}); give a folder, or a URI such as "
            "s3://BUCKET/FOLDER"
        ) from error
    return filesystem, path


def _s3(bucket: str, path: str) -> tuple[pafs.FileSystem, str]:
    """S3 as the usual environment describes it (AWS_ENDPOINT_URL, AWS_REGION, credentials); asking the bucket for its
    region would go out to the network even where the server is one's own.
    """
    if not bucket or "@" in bucket:
        raise ValueError("write s3://BUCKET/FOLDER, and give credentials in AWS_ACCESS_KEY_ID or a profile")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = pafs.resolve_s3_region(bucket)
    options: dict[str, Any] = {"region": region} if region else {}
    if endpoint is not None:
        scheme, _, host = endpoint.rpartition("://")
        options.update(endpoint_override=host.rstrip("/"), scheme=scheme or "https")
    return pafs.S3FileSystem(**options), f"{bucket}{path}"


def _entry(about: pafs.FileInfo) -> Entry:
    return Entry(int(about.size or 0), int(about.mtime_ns or 0))
