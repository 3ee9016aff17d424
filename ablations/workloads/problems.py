"""What can be wrong with an image or a clip, in words that can be counted.

A reason is a kind of problem and, after a colon, its particulars: ``truncated: image file is truncated (12 bytes not
processed)``. A note has the same form and speaks of an image that is read all the same. Counting goes by the kind.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from pathlib import PurePath

from PIL import Image, UnidentifiedImageError

NOT_AN_IMAGE = "not an image, or of an unknown format"
TRUNCATED = "truncated"
DAMAGED = "damaged"
BOMB = "a decompression bomb"
TOO_LARGE = "too large for the memory"
UNREADABLE = "cannot be read"
NO_PICTURE = "no picture"
SPECIAL = "not a plain file"
OUTSIDE_LINK = "a link that leaves the folder"
BROKEN_LINK = "a broken link"
FOLDER_LINK = "a link to a folder"
CIRCLE = "a link in a circle"
FOLDER_TWICE = "a folder that is there twice"
UNREADABLE_FOLDER = "the folder cannot be read"
COPY = "a copy"
CONTRADICTION = "the same file in two classes"
NO_LABEL = "no label"
TWO_LABELS = "two labels"

NOT_A_VIDEO = "not a video, or of an unknown format"
OTHER_CODEC = "a codec that is not read"
TOO_LONG = "too long"
SLOW = "takes too long to read"
BESIDE_CLIPS = "an image beside clips"
BAD_FRAME = "a frame cannot be used"

BROKEN_LINE = "a line without a name and a label"
NO_IMAGE = "a line without its image"
ESCAPE = "a line that leads out of the folder"
REPEATED = "a line that is there twice"

MISLABELLED = "another format than the name says"
CMYK = "CMYK colours"
PALETTE = "a palette"
DEEP = "16 bits a channel"
TRANSPARENT = "transparent"
FRAMES = "several frames"
SHORT = "short"
VARIABLE_RATE = "a variable frame rate"
SIZES = "frames of several sizes"

_SAME_FORMAT = {"JPEG": ("MPO",), "BMP": ("DIB",), "MPO": ("JPEG",)}  # what else files of this name rightly hold
_LONGEST = 300  # characters of a decoder's own words


class Unusable(ValueError):
    """An image that cannot be used; the message is the reason, kind first."""


def kind_of(reason: str) -> str:
    """What a reason, or a note, is counted as."""
    return reason.partition(": ")[0]


def reason_of(error: BaseException) -> str:
    """Why an image cannot be used, from whatever was raised while it was read and decoded."""
    words = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
    match error:
        case Unusable():
            return words
        case UnidentifiedImageError():
            return NOT_AN_IMAGE
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"{BOMB}: {words}"
        case MemoryError():
            return f"{TOO_LARGE}: {words}"
        case OSError(errno=int()):  # the system's; Pillow raises OSError without a number for what it cannot decode
            return f"{UNREADABLE}: {error.strerror or words}"
        case _:
            cut = isinstance(error, EOFError) or "truncated" in words.lower()
            return f"{TRUNCATED if cut else DAMAGED}: {words}"


def refuse_size(image: Image.Image) -> None:
    """Refuse, before anything is decoded, what would fill the memory and what is too small to show anything."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Unusable(f"{BOMB}: {image.width} x {image.height} pixels, above the limit of {limit}")
    if min(image.size) < 2:
        raise Unusable(f"{NO_PICTURE}: {image.width} x {image.height} pixels, as a placeholder has")


def notes_on_pixels(image: Image.Image, name: str) -> list[str]:
    """What is unusual about an image that is read all the same; to be asked before it is decoded."""
    notes = []
    suffix = PurePath(name).suffix.lower()
    said = _formats().get(suffix)
    if said and image.format and image.format not in (said, *_SAME_FORMAT.get(said, ())):
        notes.append(f"{MISLABELLED}: {image.format} in a file named {suffix}, read as what it is")
    if image.mode == "CMYK":
        notes.append(f"{CMYK}: converted to RGB")
    if image.mode in ("P", "PA"):
        notes.append(f"{PALETTE}: its colours are looked up")
    if image.mode.startswith("I;16"):
        notes.append(f"{DEEP}: scaled to 8")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        notes.append(f"{TRANSPARENT}: laid on white")
    return notes


def notes_on_frames(image: Image.Image) -> list[str]:
    """Whether there is more than the first frame; to be asked after it is decoded, for it may move on in the file."""
    with suppress(Exception):  # a damaged second frame is no reason to do without the first
        if getattr(image, "is_animated", False):
            return [f"{FRAMES}: the first is taken"]
    return []


@functools.cache
def _formats() -> dict[str, str]:
    """Suffix -> Pillow's name of the format."""
    return dict(Image.registered_extensions())
