"""Results kept in an object store: fetched to a folder of this machine, and what was drawn sent back.

Only files that are new or changed travel, so drawing again after a few more trials moves those trials alone.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from analysis.frame import AnalysisError

try:
    _fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows: two reports of one place at the same moment copy its files twice
    _fcntl = None

_WHOLE = ("results.parquet", "run.json", "profile.json")
_FOLDERS = ("samples", "images", "trials")
_DRAWN = ("figures", "tables")
_THREADS = 16  # most of the time is spent waiting


def is_uri(out: str) -> bool:
    """Whether OUT is a place that pyarrow's file systems know, and no folder."""
    return "://" in out


@dataclass(frozen=True)
class Place:
    """An output folder in an object store."""

    uri: str
    filesystem: pafs.FileSystem
    path: str

    def fetch(self, folder: Path) -> Path:
        """Copy what the analysis reads into a folder, and return it."""
        try:
            found = self._listed("")
            wanted = {name: info for name, info in found.items() if name in _WHOLE}
            wanted |= self._listed("samples")
            if "results.parquet" in found:
                self._copy({"results.parquet": found["results.parquet"]}, folder)
                keys = pq.read_table(folder / "results.parquet", columns=["key"])["key"].to_pylist()
                names = {f"images/{key}.parquet" for key in keys}
                wanted |= {name: info for name, info in self._listed("images").items() if name in names}
            else:  # stopped before it compacted
                trials = self._listed("trials")
                if not trials:
                    raise AnalysisError(
                        f"{self.uri} holds neither results.parquet nor trials: run the experiments first: "
                        f"make ablations OUT={self.uri}"
                    )
                wanted |= trials | self._listed("images")
            self._copy(wanted, folder)
            _forget(folder, but=wanted.keys() | ({"results.parquet"} & found.keys()))
        except (OSError, pa.ArrowException) as error:
            raise AnalysisError(f"{self.uri} cannot be read ({str(error)[:200]})") from error
        return folder

    def send(self, folder: Path) -> str:
        """Copy what was drawn back; the URI of the report."""
        files = [path for name in _DRAWN for path in sorted((folder / name).glob("*")) if path.is_file()]
        try:
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(lambda path: self._send_one(path, folder), [*files, folder / "report.html"]))
        except OSError as error:
            raise AnalysisError(
                f"the report is in {folder}, but cannot be written to {self.uri} ({str(error)[:200]})"
            ) from error
        return f"{self.uri.rstrip('/')}/report.html"

    def _listed(self, folder: str) -> dict[str, pafs.FileInfo]:
        selector = pafs.FileSelector(f"{self.path}/{folder}".rstrip("/"), allow_not_found=True)
        prefix = f"{folder}/" if folder else ""
        infos: Iterable[pafs.FileInfo] = self.filesystem.get_file_info(selector)
        return {f"{prefix}{info.base_name}": info for info in infos if info.type == pafs.FileType.File}

    def _copy(self, wanted: dict[str, pafs.FileInfo], folder: Path) -> None:
        new = [name for name, info in wanted.items() if not _same(folder / name, info)]
        for parent in {(folder / name).parent for name in new} | {folder}:
            parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda name: self._copy_one(name, wanted[name], folder), new))

    def _copy_one(self, name: str, info: pafs.FileInfo, folder: Path) -> None:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            content = stream.read()
        path = folder / name
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        partial.write_bytes(content)
        if info.mtime_ns:
            os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
        partial.replace(path)

    def _send_one(self, path: Path, folder: Path) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{path.relative_to(folder).as_posix()}") as stream:
            stream.write(path.read_bytes())


def open_place(uri: str) -> Place:
    """The place of a URI, as AWS_ENDPOINT_URL, AWS_REGION and the usual credentials describe it."""
    parts = urlsplit(uri)
    try:
        if parts.scheme == "s3" and not {"region", "endpoint_override"} & set(parse_qs(parts.query)):
            return Place(uri, _s3(parts.netloc), f"{parts.netloc}{parts.path}".rstrip("/"))
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (ValueError, NotImplementedError, OSError) as error:
        raise AnalysisError(f"{uri} cannot be opened ({str(error)[:200]}); write s3://BUCKET/FOLDER") from error
    return Place(uri.partition("?")[0], filesystem, path.rstrip("/"))


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """Where the copy of a place is kept on this machine, for one report at a time."""
    base = os.environ.get("SIEVIT_CACHE") or Path.home() / ".cache" / "sievit"
    folder = Path(base).expanduser() / "analysis" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise AnalysisError(
            f"no copy of {uri} can be kept here ({error}); name a folder: SIEVIT_CACHE=FOLDER"
        ) from error
    with file:
        if _fcntl is not None:
            with suppress(OSError):  # a disk without locks
                _fcntl.flock(file, _fcntl.LOCK_EX)
        yield folder


def _s3(bucket: str) -> pafs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = pafs.resolve_s3_region(bucket)
    options = {"region": region} if region else {}
    if endpoint is not None:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    return pafs.S3FileSystem(**options)


def _forget(folder: Path, *, but: Collection[str]) -> None:
    """Remove what is no longer there from the copy, and what an earlier report drew of it."""
    for name in _DRAWN:
        shutil.rmtree(folder / name, ignore_errors=True)
    copied = [folder / name for name in _WHOLE]
    copied += [path for name in _FOLDERS for path in (folder / name).glob("[!.]*")]
    for path in copied:
        if path.relative_to(folder).as_posix() not in but:
            path.unlink(missing_ok=True)


def _same(path: Path, info: pafs.FileInfo) -> bool:
    """The copy is of this size and time."""
    try:
        about = path.stat()
    except OSError:
        return False
    return bool(about.st_size == info.size and info.mtime_ns and about.st_mtime_ns == info.mtime_ns)
