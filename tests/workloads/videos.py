"""Small real videos made on the spot by PyAV: each frame of one grey level, which says its number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

STEP = 4  # grey levels from frame to frame: more than coding changes


def level(number: int) -> int:
    """The grey of a frame."""
    return 10 + STEP * number


def write_video(
    path: Path,
    frames: int = 20,
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    rate: int = 25,
    stamps: Sequence[int] | None = None,
    first: int = 0,
    sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """A video of ``frames`` frames; ``stamps``: when each is shown, in milliseconds; ``first``: its first grey."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 8_000_000
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        audio = out.add_stream("aac", rate=8000) if sound else None
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), level(first + number), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if audio is not None:
            _add_silence(out, audio)
    return path


def write_sound(path: Path) -> Path:
    """A file that a video player takes, with sound alone."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        _add_silence(out, out.add_stream("aac", rate=8000))
    return path


def _add_silence(out: object, stream: object) -> None:
    import av

    silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
    silence.sample_rate = 8000
    out.mux(stream.encode(silence))  # type: ignore[attr-defined]
    out.mux(stream.encode())  # type: ignore[attr-defined]


def write_frames(folder: Path, frames: int = 20, *, size: tuple[int, int] = (64, 48), ending: str = "png") -> Path:
    """A folder of frames named by their number, without zeros in front."""
    folder.mkdir(parents=True)
    for number in range(frames):
        Image.new("RGB", size, (level(number),) * 3).save(folder / f"{number}.{ending}")
    return folder


def shown(clip: np.ndarray) -> list[int]:
    """The numbers of the frames that a clip (F, H, W, C) shows, read off their grey."""
    greys = clip.reshape(len(clip), -1).mean(axis=1)
    return [round((grey - 10) / STEP) for grey in greys]
