"""Names of models as people write them: where a model comes from, and the size of image it is to read.

=====================  =====================================================================================
``NAME``               timm's, or one of the embedded workload's
``hf-hub:OWNER/NAME``  a model of timm's on the hub, ``@REVISION`` behind it if wanted
``local-dir:FOLDER``   the same in a folder
``hf:FOLDER``          a model of transformers in a folder: config.json, safetensors, preprocessor_config.json
``hf:OWNER/NAME``      the same on the hub, ``@REVISION`` behind it if wanted
=====================  =====================================================================================

Behind any of them ``?img=384`` or ``?img=384x320`` (height x width) asks for another size: ``--img-size`` writes that,
so that the name alone says which model it is, in keys, records and to workers elsewhere. ``?frames=16`` behind that
asks for another number of frames of a clip, and is written by ``--frames``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ablations.models.weight_files import ModelError
from ablations.records.files import absolute, user_path

TIMM_HUB, TIMM_FOLDER, TRANSFORMERS = "hf-hub", "local-dir", "hf"
_SOURCES = (TIMM_HUB, TIMM_FOLDER, TRANSFORMERS)
_SIZE = re.compile(r"(\d{1,5})(?:\s*[x,]\s*(\d{1,5}))?")
_MARK, _FRAMES_MARK = "?img=", "?frames="
_FRAMES = re.compile(r"[1-9]\d{0,3}")


@dataclass(frozen=True)
class ModelName:
    """A name taken apart."""

    source: str  # "" for timm's and the embedded ones
    what: str  # name, folder, or owner/name[@revision]
    size: tuple[int, int] | None = None  # height and width in pixels; None: the model's own
    frames: int | None = None  # of a clip; None: the model's own, if it reads clips

    @property
    def folder(self) -> Path | None:
        """Where the model lies, if it lies in a folder."""
        if self.source == TIMM_FOLDER:
            return user_path(self.what)
        if self.source != TRANSFORMERS:
            return None
        folder = user_path(self.what)
        looks = self.what.startswith(("/", ".", "~")) or self.what.count("/") != 1
        return folder if looks or folder.is_dir() else None

    def __str__(self) -> str:
        where = f"{self.source}:{self.what}" if self.source else self.what
        if self.size is not None:
            height, width = self.size
            where += f"{_MARK}{height}" + ("" if width == height else f"x{width}")
        return where if self.frames is None else f"{where}{_FRAMES_MARK}{self.frames}"


def parse_model_name(text: str) -> ModelName:
    """A name from its text.

    Raises:
        ModelError: a source that does not exist, a size or a number of frames that is none, or a source without a name.
    """
    text, timed, frames = text.partition(_FRAMES_MARK)
    bare, mark, size = text.partition(_MARK)
    source, colon, what = bare.partition(":")
    if not colon:
        source, what = "", bare
    elif source not in _SOURCES:
        raise ModelError(
            f"unknown source {source!r} of the model {text!r}: write a timm name, "
            f"{', '.join(f'{known}:…' for known in _SOURCES)}"
        )
    if not what:
        raise ModelError(f"nothing stands behind {source}: in the model {text!r}; write a folder or OWNER/NAME there")
    return ModelName(source, what, parse_size(size) if mark else None, parse_frames(frames) if timed else None)


def parse_frames(text: str) -> int:
    """``16``: frames of a clip."""
    if not _FRAMES.fullmatch(text.strip()):
        raise ModelError(f"{text!r} is no number of frames: write 16")
    return int(text)


def parse_size(text: str) -> tuple[int, int]:
    """``384``, ``384,320`` or ``384x320``: height and width in pixels."""
    found = _SIZE.fullmatch(text.strip())
    if not found or not int(found[1]) or (found[2] and not int(found[2])):
        raise ModelError(f"the image size {text!r} is no size: write 384, or 384,320 (height, width) in pixels")
    return int(found[1]), int(found[2] or found[1])


def chosen_name(text: str, size: str | None = None, frames: str | None = None) -> str:
    """A model's name as records hold it: a folder by its full path, the size of image and frames in the name."""
    name = parse_model_name(text)
    what = name.what if name.folder is None else absolute(name.what) or name.what
    return str(
        ModelName(
            name.source,
            what,
            name.size if size is None else parse_size(size),
            name.frames if frames is None else parse_frames(frames),
        )
    )
