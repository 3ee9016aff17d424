"""The result files of a run as tidy data frames: the only place where the analysis reads what the experiments
wrote.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ablations.records.columns import Kind, row_columns
from ablations.records.kinds import kind_of
from ablations.records.names import IMAGES, RESULTS, RUN, SUFFIX, TRIALS
from ablations.records.parquet import owner, read_parquet
from ablations.records.storage import Disk
from analysis.files import read_left_rows, read_rows

log = logging.getLogger(__name__)

REQUIRED = ("spec", "key", "status", "variant")
FINETUNED = "finetuned"
NUMBERS = row_columns(Kind.REAL, Kind.WHOLE)
WORDS = tuple(name for name in row_columns(Kind.TEXT) if name not in REQUIRED)
FLAGS = tuple(name for name in row_columns(Kind.FLAG) if name != FINETUNED)
"""True, False, or None where a trial does not say; that it is not finetuned it need not say."""
LISTS = row_columns(Kind.REALS, Kind.WHOLES)
REMEDY = "run the experiments first: make ablations OUT={out}"
KEPT_ROWS = 1_000_000  # rows of per-image tables held at once: some hundreds of megabytes
OTHER_INPUTS = {"small_input", "fewer_frames"}  # controls that show the model less, and choose no patches of it
ORACLES = {"back_tracking"}  # methods that read what nobody has beforehand: drawn and listed, and nobody's choice


class AnalysisError(ValueError):
    """The results cannot be read; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Setting:
    """What was evaluated on what: numbers of two settings never share a figure, a table or a test."""

    workload: str
    model: str
    weights: str  # "embedded", "hub", "file" or "random"
    images: int
    weights_digest: str
    data_digest: str

    @property
    def slug(self) -> str:
        """Short, safe in a file name, and different for different settings of the same model."""
        name = "".join(c if c.isalnum() or c in "_-" else "-" for c in f"{self.workload}-{self.model}-{self.images}")
        return f"{name}-{self.weights_digest[:6]}{self.data_digest[:6]}".strip("-")


class ImageTables(Mapping[str, pd.DataFrame]):
    """``images/<key>.parquet`` by key, read when asked for; a key whose file is missing or unreadable is not
    there. The bits of the kept patches, most of a file, are read by ``kept`` alone. Of many large tables only the
    latest are held.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._storage = Disk(folder)
        self._read: dict[str, pd.DataFrame | None] = {}  # the longest unused first
        self._rows = 0  # in it
        self._bits: dict[str, np.ndarray | None] = {}

    def _open(self, key: str, columns: Callable[[list[str]], list[str]]) -> pa.Table | None:
        """The wanted columns of one file; None where it is missing or damaged."""
        path = self._folder / f"{key}{SUFFIX}"
        if not path.is_file():
            return None
        try:
            schema = pq.read_schema(path)
            whose = owner(schema.metadata)
            if whose not in (key, None):
                raise pa.ArrowInvalid(f"it is of the trial {whose}")
            return read_parquet(self._storage, path.name, columns=columns(schema.names))
        except (OSError, ValueError, pa.ArrowException) as error:
            log.warning(
                "%s cannot be used (%s): the tests that need it are left out; delete it, and the command of the run "
                "computes it again",
                path, error,
            )  # fmt: skip
            return None

    def _load(self, key: str) -> pd.DataFrame | None:
        if key not in self._read:
            found = self._open(key, lambda names: [name for name in names if name != "kept"])
            table = None if found is None else found.to_pandas()
            self._read[key] = table if table is not None and {"image", "correct"} <= set(table.columns) else None
            self._rows += _length(self._read[key])
            while self._rows > KEPT_ROWS and len(self._read) > 1:
                self._rows -= _length(self._read.pop(next(iter(self._read))))
        else:
            self._read[key] = self._read.pop(key)
        return self._read[key]

    def kept(self, key: str) -> np.ndarray | None:
        """(images, blocks, bytes) uint8: the packed bits of surviving patches, rows as in the table of ``key``."""
        if key not in self._bits:
            found = self._open(key, lambda names: [name for name in names if name == "kept"])
            self._bits[key] = None if found is None else _as_bits(found)
        return self._bits[key]

    def __getitem__(self, key: str) -> pd.DataFrame:
        table = self._load(key)
        if table is None:
            raise KeyError(key)
        return table

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._folder.glob(f"*{SUFFIX}")) if self._load(path.stem) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


MEASURED = {"embed": "cosine", "dense": "miou"}
"""Tasks whose trials are told by a measure of their own, and its column: no figure of accuracy shows them."""


@dataclass(frozen=True)
class Results:
    """One output folder: its trials, its per-image tables, and the record of what was run."""

    folder: Path
    trials: pd.DataFrame
    run: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def images(self) -> ImageTables:
        return ImageTables(self.folder / IMAGES)

    @property
    def finished(self) -> pd.DataFrame:
        rows = self.trials
        answered = rows["top1"].notna() & rows["gmacs_mean"].notna() & ~rows["task"].isin(list(MEASURED))
        return rows[(rows["status"] == "ok") & answered]

    @property
    def features(self) -> pd.DataFrame:
        """Finished trials of the tasks that are told by another measure than accuracy: none of ``finished``."""
        rows = self.trials
        answered = pd.Series(False, index=rows.index)
        for task, measure in MEASURED.items():
            answered |= (rows["task"] == task) & rows[measure].notna()
        return rows[(rows["status"] == "ok") & answered & rows["gmacs_mean"].notna()]

    @property
    def failed(self) -> pd.DataFrame:
        return self.trials.drop(self.finished.index.union(self.features.index))

    @property
    def specs(self) -> list[str]:
        """Names of the specs, in the order they were run, then any other that left trials."""
        named = list(self.about_specs)
        return named + [name for name in self.trials["spec"].unique() if name not in named]

    @property
    def about_specs(self) -> dict[str, dict[str, Any]]:
        """Title, question and caption of each spec as the run recorded them; {} where it did not."""
        return about_specs(self.run)

    @property
    def skipped_images(self) -> list[tuple[str, str]]:
        """(file, reason) of each image the workload could not read."""
        return [_file_and_reason(entry) for entry in self.run.get("skipped") or self.run.get("skipped_images") or []]

    def settings(self, rows: pd.DataFrame | None = None) -> list[Setting]:
        """The settings of some trials (those of ``finished``)."""
        rows = self.finished if rows is None else rows
        columns = ["workload", "model", "weights", "images", "weights_digest", "data_digest"]
        groups = rows.groupby(columns, sort=False, dropna=False).size()
        return [Setting(w, m, k, int(n), str(wd), str(dd)) for w, m, k, n, wd, dd in groups.index]

    def left(self) -> Results:
        """The trials of earlier runs that the folder holds and this record does not."""
        found = read_left_rows(self.folder, set(self.trials["key"]), needed=REQUIRED)
        return Results(self.folder, self.trials.iloc[:0] if found is None else tidy(found.to_pandas()), self.run)

    def of(self, setting: Setting, spec: str | None = None, *, rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """Trials of a setting (and a spec): of ``rows``, or of ``finished``."""
        rows = self.finished if rows is None else rows
        keep = np.ones(len(rows), dtype=bool)
        for name, value in vars(setting).items():
            keep &= (rows[name] == value).to_numpy()
        if spec is not None:
            keep &= (rows["spec"] == spec).to_numpy()
        return rows[keep]


def about_specs(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a run recorded of each of its specs."""
    specs = run.get("specs") or {}
    if isinstance(specs, Mapping):
        return {str(name): dict(about) if isinstance(about, Mapping) else {} for name, about in specs.items()}
    entries = [entry if isinstance(entry, Mapping) else {"name": entry} for entry in specs]
    return {str(entry.get("name", entry.get("spec"))): dict(entry) for entry in entries}


def read_results(out: Path) -> Results:
    """Read an output folder; AnalysisError where it is missing, empty or damaged."""
    remedy = REMEDY.format(out=out)
    if not out.is_dir():
        raise AnalysisError(f"{out} is not a folder: {remedy}")
    try:
        found = read_rows(out, needed=REQUIRED)
    except (OSError, pa.ArrowException) as error:
        raise AnalysisError(f"{out}: results cannot be read ({error}); delete the damaged file and {remedy}") from error
    if found is None:
        raise AnalysisError(f"{out} holds neither {RESULTS} nor {TRIALS}/*{SUFFIX}: {remedy}")
    trials = found.to_pandas()
    if trials.empty:
        raise AnalysisError(f"{out}/{RESULTS} has no rows: {remedy}")
    missing = [name for name in REQUIRED if name not in trials.columns]
    if missing:
        raise AnalysisError(f"{out}/{RESULTS} lacks the columns {', '.join(missing)}: {remedy}")
    run = _read_run(out / RUN)
    return Results(out, tidy(trials, about_specs(run)), run)


def tidy(trials: pd.DataFrame, about: Mapping[str, Mapping[str, Any]] | None = None) -> pd.DataFrame:
    """The same rows with every column the analysis uses, of the type it expects, nulls included; and the kind of
    answer that each row's spec asks for (``about``: what the run recorded of its specs).
    """
    rows = trials.reset_index(drop=True).copy()
    for name in NUMBERS:
        rows[name] = pd.to_numeric(rows[name], errors="coerce") if name in rows else np.nan
    for name in (*REQUIRED, *WORDS):
        column = rows[name] if name in rows else pd.Series(None, index=rows.index, dtype=object)
        rows[name] = column.astype(object).where(column.notna(), "").astype(str)
    for name in FLAGS:
        column = rows[name] if name in rows else pd.Series(None, index=rows.index, dtype=object)
        rows[name] = pd.Series([None if pd.isna(v) else bool(v) for v in column], index=rows.index, dtype=object)
    for name in LISTS:
        column = rows[name] if name in rows else pd.Series(None, index=rows.index, dtype=object)
        rows[name] = pd.Series([_as_list(value) for value in column], index=rows.index, dtype=object)
    rows["images"] = rows["images"].fillna(0).astype(int)
    finetuned = rows[FINETUNED] if FINETUNED in rows else pd.Series(False, index=rows.index)
    rows[FINETUNED] = finetuned.astype(object).where(finetuned.notna(), False).astype(bool)
    rows["variant"] = [variant or spec for variant, spec in zip(rows["variant"], rows["spec"], strict=True)]
    # A series of which some trials are finetuned and some are not is two series.
    both = rows.groupby(["spec", "variant"])["finetuned"].transform("nunique") > 1
    rows.loc[both & rows["finetuned"], "variant"] += " (finetuned)"
    rows["kind"] = rows["spec"].map({name: kind_of(name, (about or {}).get(name)) for name in rows["spec"].unique()})
    rows["dense"] = [is_dense(row) for row in records_of(rows)]
    return rows


def is_dense(row: Mapping[str, Any]) -> bool:
    """Whether a trial ran the plain model: it says so, or no block reduces anything. Trained from random weights, it is
    a series like the others.
    """
    if row["finetuned"] and row["weights"] == "random":
        return False
    plain = row["status"] == "ok" and row["reducer"] != "" and set(reducer_names(row["reducer"])) <= {"identity"}
    return plain or str(row["variant"]).casefold() == "dense"


def records_of(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A dict a row, as ``to_dict("records")`` makes them, which asks the frame for one column after another: five to
    fifteen times as long where columns are many and rows few.
    """
    names = rows.columns.tolist()
    return [
        {name: value.item() if isinstance(value, np.generic) else value for name, value in zip(names, row, strict=True)}
        for row in rows.to_numpy(dtype=object)
    ]


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """The rows with their columns as attributes; what type each has, no frame knows."""
    return iter(table.itertuples())


def row_nearest(table: pd.DataFrame, column: str, wanted: float) -> dict[str, Any]:
    """The row whose number in a column is nearest to the wanted one; of several the first."""
    away: Any = (table[column] - wanted).abs().idxmin()
    return {str(name): value for name, value in table.loc[away].items()}


def choosable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that somebody could choose: all but those of oracles."""
    return rows[[not ORACLES & set(reducer_names(text)) for text in rows["reducer"]]]


def choosing(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in which a method chooses patches: all but those of smaller images and of fewer frames."""
    return rows[[not OTHER_INPUTS & set(reducer_names(text)) for text in rows["reducer"]]]


def reducer_names(stages: str) -> list[str]:
    """Reducer names in the JSON of a placement, outermost first, each once: ["evit", "ats"]."""
    found: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, Mapping):
            if isinstance(value.get("name"), str) and value["name"] not in ("stack", *found):
                found.append(value["name"])
            for part in value.values():
                walk(part)
        elif isinstance(value, list):
            for part in value:
                walk(part)

    try:
        walk(json.loads(stages))
    except (TypeError, ValueError):
        return [stages] if stages else []
    return found


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes) else []


def _length(table: pd.DataFrame | None) -> int:
    return 0 if table is None else len(table)


def _as_bits(table: pa.Table) -> np.ndarray | None:
    """The column ``kept`` (list of blocks of bytes) as one array; None where it is missing or ragged."""
    if "kept" not in table.column_names or not table.num_rows:
        return None
    column = table.column("kept").combine_chunks()
    blocks = column.flatten()
    lengths = {len(value) for value in blocks[:1].to_pylist() if value is not None}
    if not lengths or len(blocks) % table.num_rows:
        return None
    joined = b"".join(value or b"" for value in blocks.to_pylist())
    size = len(blocks) * lengths.pop()
    if len(joined) != size or not size:
        return None
    return np.frombuffer(joined, dtype=np.uint8).reshape(table.num_rows, len(blocks) // table.num_rows, -1)


def _file_and_reason(entry: object) -> tuple[str, str]:
    if isinstance(entry, Mapping):
        return str(entry.get("file", entry.get("image", "?"))), str(entry.get("reason", entry.get("error", "")))
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) >= 2:
        return str(entry[0]), str(entry[1])
    return str(entry), "no reason recorded"


def _read_run(path: Path) -> Mapping[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): the report does without it", path, error)
        return {}
    return run if isinstance(run, Mapping) else {}
