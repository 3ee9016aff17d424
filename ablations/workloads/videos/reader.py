"""Videos as files, decoded by PyAV (the extra ``sievit[video]``), which is imported when the first is read.

Files are untrusted. One is opened as a file that is open already, so nothing in it can name another file or an address;
containers, codecs, the size of a frame, the number of frames and the time taken are bounded. What PyAV says becomes a
reason that can be counted (``problems``).

Frames are chosen by the time at which they are shown: frame ``i`` of a video is what is on the screen after ``i`` mean
intervals. Where the rate is steady that is the ``i``-th frame.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from ablations.workloads.base import WorkloadError
from ablations.workloads.problems import (
    BOMB,
    DAMAGED,
    NO_PICTURE,
    NOT_A_VIDEO,
    OTHER_CODEC,
    SHORT,
    SLOW,
    TOO_LONG,
    TRUNCATED,
    VARIABLE_RATE,
    Unusable,
)
from ablations.workloads.videos.prepare import ClipPreprocess

if TYPE_CHECKING:
    from types import ModuleType

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".webm", ".mkv"})
CONTAINERS = "mov,mp4,matroska,webm,avi"  # demuxers of libavformat
CODECS = (  # as libavcodec names what a stream holds: what such files hold, and is decoded without a device
    "h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "msmpeg4v2", "msmpeg4v3", "mpeg1video", "mpeg2video", "mjpeg", "h263",
    "flv1", "theora", "ffv1", "wmv1", "wmv2", "rawvideo", "huffyuv",
)  # fmt: skip
_DECODERS = ",".join((*CODECS, "libdav1d", "libvpx", "libvpx-vp9", "libaom-av1"))  # no sound is decoded
MAX_PIXELS = 4096 * 4096  # of a frame
MAX_FRAMES = 60_000  # of a video: half an hour at 30 a second
SECONDS = 120.0  # that reading one may take
_CLOSE = 0.25  # of an interval: how much later than asked for a frame may be shown
_UNEVEN = 0.5  # of the mean interval: from here on the rate is said to vary
_MISSING = 8  # frames at the end that decoders may keep to themselves


def check_installed() -> None:
    """Raise WorkloadError where there is no PyAV."""
    _av()


def decoder_version() -> str:
    """Of PyAV and its codecs, for cache keys; "" where they are not installed."""
    try:
        av = _av()
    except WorkloadError:
        return ""
    versions = av.library_versions
    return f"av {av.__version__}, avcodec {'.'.join(map(str, versions['libavcodec']))}"


def read_video(path: Path, prepare: ClipPreprocess) -> tuple[np.ndarray, tuple[str, ...]]:
    """The clip of a video, (views · F, H, W, C) uint8, and what is unusual about the file.

    Raises:
        Unusable: it is no video, it is broken, or it is more than is read.
        WorkloadError: PyAV is not installed.
    """
    clock = _Clock(path)
    shown = _times(path, clock)
    wanted = prepare.places(len(shown.at))
    crops: dict[int, np.ndarray] = {}
    places = sorted(set(wanted.flat))
    with _opened(path) as (container, stream):
        frames = _decoded(container, stream, clock)
        for place, frame in _pick(frames, [(place, shown.at[place]) for place in places], shown.interval):
            crops[place] = prepare.crops(_picture(frame))
    notes = [VARIABLE_RATE + ": frames are taken by the time at which they are shown"] if shown.uneven else []
    if prepare.too_short(len(shown.at)):
        notes.append(f"{SHORT}: {len(shown.at)} frames, some are shown twice")
    return prepare.clip(wanted, crops), tuple(notes)


# --- when frames are shown --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    at: list[float]  # of each interval of the video: until when the frame that is taken for it must have appeared
    interval: float
    uneven: bool


def _times(path: Path, clock: _Clock) -> _Shown:
    """When frames are shown, in the stream's own units, or by their number where the container does not say."""
    with _opened(path) as (container, stream):
        stamps = _stamps(container, stream, clock)
    if stamps is None:
        with _opened(path) as (container, stream):
            stamps = [at for at, _ in _decoded(container, stream, clock)]
    if not stamps:
        raise Unusable(f"{NO_PICTURE}: not one frame")
    stamps = sorted(set(stamps))
    if len(stamps) == 1:
        return _Shown([stamps[0]], 1.0, False)
    interval = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    steps = np.diff(stamps)
    uneven = bool((np.abs(steps - interval) > max(1.0, _UNEVEN * interval)).any())
    late = _CLOSE * interval
    return _Shown([stamps[0] + place * interval + late for place in range(len(stamps))], interval, uneven)


def _stamps(container: Any, stream: Any, clock: _Clock) -> list[float] | None:
    """When each frame is shown, read off the container without decoding; None where it does not say.

    Raises:
        Unusable: the file ends before it should by its own account.
    """
    stamps, end = [], 0.0
    with _reading():
        for count, packet in enumerate(container.demux(stream)):
            clock.check(count)
            if packet.size and not packet.is_discard:
                if packet.pts is None:
                    return None
                stamps.append(float(packet.pts))
                end = max(end, float(packet.pts + (packet.duration or 0)))
    declared = _declared(container, stream)
    if declared is not None and len(stamps) > 1:
        length = end - min(stamps)
        if declared - length > max(0.05 * declared, _MISSING * length / len(stamps)):
            of = float(stream.time_base)
            raise Unusable(f"{TRUNCATED}: it ends after {length * of:.2f} of {declared * of:.2f} s")
    return stamps


def _declared(container: Any, stream: Any) -> float | None:
    """How long the pictures last by the account of the file, in the units of the stream; None where it has none."""
    if stream.duration:
        return float(stream.duration)
    if container.duration and not container.streams.audio:  # sound may be longer
        return float(container.duration / _av().time_base / stream.time_base)
    return None


def _pick(
    frames: Iterator[tuple[float, Any]], wanted: list[tuple[int, float]], interval: float
) -> Iterator[tuple[int, Any]]:
    """For each wanted place, in their order, the frame that is on the screen then."""
    waiting = iter(wanted)
    place, until = next(waiting)
    last: Any = None
    seen = last_at = 0.0
    for at, frame in frames:
        seen += 1
        while at > until:  # what was shown before is still there then; before the first frame, the first
            yield place, frame if last is None else last
            following = next(waiting, None)
            if following is None:
                return
            place, until = following
        last, last_at = frame, at
    if last is None:
        raise Unusable(f"{DAMAGED}: no frame can be decoded")
    if until - last_at > (_MISSING + 1) * interval:
        raise Unusable(f"{TRUNCATED}: {seen:.0f} frames can be decoded, and then no more")
    yield place, last
    for place, until in waiting:
        if until - last_at > (_MISSING + 1) * interval:
            raise Unusable(f"{TRUNCATED}: {seen:.0f} frames can be decoded, and then no more")
        yield place, last


# --- files ------------------------------------------------------------------------------------------------------------


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise WorkloadError(
            "videos are decoded by PyAV, which is not installed: pip install 'sievit[video]', or give folders of frames"
        ) from error
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file and its one stream of pictures."""
    with path.open("rb") as file, _container(file) as container:
        yield container, _stream(container)


@contextmanager
def _container(file: BinaryIO) -> Iterator[Any]:
    av = _av()
    options = {"protocol_whitelist": "none", "format_whitelist": CONTAINERS, "codec_whitelist": _DECODERS}
    try:
        container = av.open(file, mode="r", container_options=options, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:  # an empty file fails in Python's own seek
        raise Unusable(f"{NOT_A_VIDEO}: {_words(error)}") from error
    with container:
        yield container


def _stream(container: Any) -> Any:
    """The stream of pictures, a cover not among them."""
    av = _av()
    streams = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        what = "sound alone" if container.streams.audio else "no stream of pictures"
        raise Unusable(f"{NO_PICTURE}: {what}")
    stream = streams[0]
    name = stream.codec_context.name if stream.codec_context is not None else "unknown"
    if stream.codec_context is None or stream.codec_context.codec.canonical_name not in CODECS:
        raise Unusable(f"{OTHER_CODEC}: {name}")
    if stream.width * stream.height > MAX_PIXELS:
        raise Unusable(f"{BOMB}: frames of {stream.width} x {stream.height} pixels, above the limit of {MAX_PIXELS}")
    if 0 < min(stream.width, stream.height) < 2:
        raise Unusable(f"{NO_PICTURE}: frames of {stream.width} x {stream.height} pixels")
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may change its size on the way
    stream.codec_context.thread_count = 1  # files are decoded side by side
    return stream


def _decoded(container: Any, stream: Any, clock: _Clock) -> Iterator[tuple[float, Any]]:
    """(when it is shown, frame), in the order of showing; by number where the container does not say when."""
    frames = iter(container.decode(stream))
    number = 0
    while True:
        with _reading():
            frame = next(frames, None)
        if frame is None:
            return
        clock.check(number)
        yield float(number if frame.pts is None else frame.pts), frame
        number += 1


@contextmanager
def _reading() -> Iterator[None]:
    """What FFmpeg says of a file while it is read, as a reason."""
    try:
        yield
    except (_av().error.FFmpegError, EOFError) as error:
        words = _words(error)
        kind = TRUNCATED if isinstance(error, EOFError) or "partial" in words.lower() else DAMAGED
        raise Unusable(f"{kind}: {words}") from error


def _picture(frame: Any) -> Image.Image:
    """A frame's colours. How a phone was held (a display matrix) is ignored, as EXIF's orientation of images is."""
    if frame.is_corrupt:
        raise Unusable(f"{DAMAGED}: a frame is decoded in part")
    if frame.width * frame.height > MAX_PIXELS:
        raise Unusable(f"{BOMB}: a frame of {frame.width} x {frame.height} pixels")
    return Image.fromarray(frame.to_ndarray(format="rgb24"))


def _words(error: Any) -> str:
    return str(getattr(error, "strerror", None) or error)


class _Clock:
    """How much is read of one file, in frames and in seconds."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + SECONDS
        self._path = path

    def check(self, frames: int) -> None:
        if frames >= MAX_FRAMES:
            raise Unusable(f"{TOO_LONG}: more than {MAX_FRAMES} frames; cut it into clips")
        if self._now() > self._end:
            raise Unusable(f"{SLOW}: not read within {SECONDS:.0f} s")
