"""How much of real clips stands still: the share of patches that ``rlt`` drops, against its threshold.

A folder of folders of frames is read in the layout of DAVIS: ``FOLDER/CLIP/00000.jpg``, …. Frames are taken as they
are, cut to whole patches, and normalised as models of ImageNet get them; each folder is cut into clips of as many
frames as a model reads, one after another, and what is left over at its end is not looked at. The first tubelets of a
clip always stay, so no threshold drops more than (steps - 1) / steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import figures, models
from reducers.methods.rlt import Reference, changes, kept_tubelets

THRESHOLDS = tuple(round(10 ** (power / 10), 4) for power in range(-20, 6))  # 0.01 to 3.16
TABLED = (0.05, 0.1, 0.2, 0.4)
PUBLISHED = 0.1
PATCH = 16  # pixels of a side
_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}


@dataclass(frozen=True)
class Reading:
    """How a model reads clips."""

    frames: int = 16  # of a clip
    stride: int = 1  # every which frame of the folder
    deep: int = 2  # frames of a tubelet

    @property
    def words(self) -> str:
        """As a title."""
        tubelet = f"tubelets of {self.deep} frames" if self.deep > 1 else "patches of one frame"
        every = "every frame" if self.stride == 1 else f"one frame in {self.stride}"
        return f"{self.frames} frames, {every}, {tubelet}"

    @property
    def most(self) -> float:
        """The largest share that can be dropped."""
        steps = self.frames // self.deep
        return (steps - 1) / steps


@dataclass(frozen=True)
class Row:
    """What goes of one folder, as shares."""

    clips: int
    shares: list[float]  # at each of ``THRESHOLDS``
    tabled: list[float]  # … of ``TABLED``
    kept: float  # at the published one, compared with the last tubelet that stayed


READINGS = (Reading(), Reading(stride=2), Reading(frames=8, stride=4, deep=1))


def frames_of(folder: Path) -> Tensor:
    """(F, 3, H, W) float32: all frames of a folder, in the order of their names."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise SystemExit(f"{folder} holds no frames ({', '.join(sorted(_SUFFIXES))})")
    return torch.stack([models.whole(file, PATCH) for file in files])


def clips_of(frames: Tensor, reading: Reading, name: str) -> Tensor:
    """(B, F, 3, H, W): the clips that a model reads of the frames of one folder."""
    frames = frames[:: reading.stride]
    whole = len(frames) // reading.frames
    if not whole:
        raise SystemExit(f"{name} holds {len(frames)} frames at this stride, fewer than a clip's {reading.frames}")
    return frames[: whole * reading.frames].unflatten(0, (whole, reading.frames))


def dropped(clips: Tensor, reading: Reading, thresholds: Sequence[float], reference: Reference) -> list[float]:
    """The share of tubelets that go, at each threshold."""
    tubelet = (reading.deep, PATCH, PATCH)
    if reference == "previous":
        found = changes(clips, tubelet)
        return [float((found <= tau).double().mean()) for tau in thresholds]
    return [float((~kept_tubelets(clips, tubelet, tau, reference)).double().mean()) for tau in thresholds]


def run(data: Path, out: Path) -> list[Path]:
    """Measure every folder of frames, and write ``still-NAME.json``, ``.md`` and ``.png``; the files written."""
    folders = sorted(folder for folder in data.iterdir() if folder.is_dir())
    if not folders:
        raise SystemExit(f"{data} holds no folders of frames")
    found: dict[Reading, dict[str, Row]] = {reading: {} for reading in READINGS}
    for folder in folders:
        frames = frames_of(folder)
        for reading, rows in found.items():
            clips = clips_of(frames, reading, folder.name)
            shares = dropped(clips, reading, (*THRESHOLDS, *TABLED), "previous")
            kept = dropped(clips, reading, (PUBLISHED,), "kept")[0]
            rows[folder.name] = Row(len(clips), shares[: len(THRESHOLDS)], shares[len(THRESHOLDS) :], kept)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"still-{data.parent.name if data.name == 'frames' else data.name}"
    files = [stem.with_suffix(suffix) for suffix in (".json", ".md")]
    files[0].write_text(json.dumps(plain(found), indent=1) + "\n", encoding="utf-8")
    files[1].write_text(table(found, stem.name.removeprefix("still-")), encoding="utf-8")
    panels = {
        (reading.words, reading.most): {name: row.shares for name, row in rows.items()}
        for reading, rows in found.items()
    }
    drawn = figures.still_figure(panels, THRESHOLDS, PUBLISHED, stem.with_suffix(".png"))
    return [*files, *([] if drawn is None else [drawn])]


def plain(found: dict[Reading, dict[str, Row]]) -> dict[str, object]:
    """As JSON has it."""
    told = [
        {"reading": asdict(reading), "folders": {name: asdict(row) for name, row in rows.items()}}
        for reading, rows in found.items()
    ]
    return {"thresholds": THRESHOLDS, "tabled": TABLED, "readings": told}


def table(found: dict[Reading, dict[str, Row]], name: str) -> str:
    """The numbers for people."""
    lines = [
        f"# What stands still in {name}",
        "",
        "Share of tubelets (%) that `rlt` drops at a threshold tau, frames as they are, ImageNet's mean and deviation. "
        "*kept*: at the published 0.1, compared with the last tubelet that stayed. The first tubelets of a clip "
        "always stay.",
    ]
    for reading, rows in found.items():
        lines += [
            "",
            f"## {reading.words[:1].upper()}{reading.words[1:]}",
            "",
            f"| folder | clips | {' | '.join(f'tau {tau:g}' for tau in TABLED)} | 0.1, kept |",
            "| --- " * (len(TABLED) + 3) + "|",
        ]
        shares = []
        for folder, row in rows.items():
            values = [*row.tabled, row.kept]
            shares.append(values)
            lines.append(f"| {folder} | {row.clips} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
        means = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
        lines.append(f"| *mean of folders* |  | {' | '.join(f'{100 * value:.1f}' for value in means)} |")
    return "\n".join(lines) + "\n"
