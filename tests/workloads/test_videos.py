"""Videos as files: which frames are taken, and what becomes of those that are broken or hostile."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ablations.workloads.base import WorkloadError
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.problems import Unusable, kind_of
from ablations.workloads.videos import reader
from ablations.workloads.videos.prepare import ClipPreprocess
from ablations.workloads.videos.sampling import Sampling, parse_sampling, places
from tests.workloads.videos import shown, write_sound, write_video

FRAME = Preprocess((32, 32), 3, 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)


def prepare(frames: int = 4, stride: int | None = None, temporal: int = 1, spatial: int = 1) -> ClipPreprocess:
    return ClipPreprocess(FRAME, frames, Sampling(stride, temporal, spatial))


def read_or_why_not(path: Path) -> np.ndarray | str:
    """Its clip, or the kind of the reason against it."""
    try:
        return reader.read_video(path, prepare(4))[0]
    except Unusable as error:
        return kind_of(str(error))


def refused(path: Path, *, at: ClipPreprocess | None = None) -> str:
    with pytest.raises(Unusable) as caught:
        reader.read_video(path, at or prepare())
    return str(caught.value)


# --- which frames -----------------------------------------------------------------------------------------------------


def test_without_a_stride_the_middles_of_equal_parts_are_taken() -> None:
    assert places(20, frames=4, stride=None, temporal=1).tolist() == [[2, 7, 12, 17]]
    assert places(4, frames=4, stride=None, temporal=1).tolist() == [[0, 1, 2, 3]]
    assert places(3, frames=4, stride=None, temporal=1).tolist() == [[0, 1, 1, 2]]


def test_one_view_lies_in_the_middle_and_several_reach_from_end_to_end() -> None:
    assert places(20, frames=4, stride=2, temporal=1).tolist() == [[6, 8, 10, 12]]
    assert places(20, frames=4, stride=2, temporal=3).tolist() == [[0, 2, 4, 6], [6, 8, 10, 12], [13, 15, 17, 19]]


def test_a_short_video_repeats_its_last_frame() -> None:
    assert places(5, frames=4, stride=2, temporal=2).tolist() == [[0, 2, 4, 4]] * 2


@pytest.mark.parametrize(("length", "frames", "stride", "temporal"), [(300, 8, 32, 1), (7, 16, 4, 10), (1, 8, None, 1)])
def test_every_view_has_its_frames_in_order_and_inside(length: int, frames: int, stride: int, temporal: int) -> None:
    found = places(length, frames=frames, stride=stride, temporal=temporal)
    assert found.shape == (temporal, frames) and found.min() >= 0 and found.max() < length
    assert (np.diff(found, axis=1) >= 0).all() and (np.diff(found, axis=0) >= 0).all()


def test_views_are_written_as_tables_print_them() -> None:
    assert parse_sampling(4, "4x3") == Sampling(4, 4, 3)
    assert parse_sampling(None, "3") == Sampling(None, 1, 3) and parse_sampling(None, None) == Sampling()
    for words, stride in (("3x", 4), ("0", None), ("2", None), ("4x3", None), ("1x5", 4), ("many", 1)):
        with pytest.raises(WorkloadError):
            parse_sampling(stride, words)
    with pytest.raises(WorkloadError, match="STRIDE"):
        parse_sampling(0, None)


@pytest.mark.parametrize(
    ("ending", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx-vp9")]
)
def test_the_frames_asked_for_are_those_read(tmp_path: Path, ending: str, codec: str) -> None:
    path = write_video(tmp_path / f"a.{ending}", 20, codec=codec)
    clip, notes = reader.read_video(path, prepare(4, stride=3))
    assert clip.shape == (4, 32, 32, 3) and clip.dtype == np.uint8
    assert shown(clip) == [5, 8, 11, 14] and notes == ()


def test_views_come_one_after_the_other_crops_within_views_in_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    clip, _ = reader.read_video(path, prepare(4, stride=2, temporal=2, spatial=3))
    assert shown(clip) == 3 * [0, 2, 4, 6] + 3 * [13, 15, 17, 19]


def test_frames_of_a_variable_rate_are_taken_by_time(tmp_path: Path) -> None:
    """Ten frames in a second and ten in nine: evenly in time, most are of the slow part."""
    stamps = [100 * number for number in range(10)] + [1000 + 900 * number for number in range(10)]
    path = write_video(tmp_path / "a.mkv", 20, stamps=stamps, codec="libvpx-vp9")
    clip, notes = reader.read_video(path, prepare(4))
    assert [kind_of(note) for note in notes] == ["a variable frame rate"]
    until = [(place + 0.25) * stamps[-1] / 19 for place in (2, 7, 12, 17)]
    assert shown(clip) == [max(i for i, at in enumerate(stamps) if at <= late) for late in until]
    assert shown(clip)[0] >= 9  # by number it would be frame 2


def test_a_short_video_is_read_and_noted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    clip, notes = reader.read_video(path, prepare(4, stride=2))
    assert shown(clip) == [0, 2, 2, 2] and [kind_of(note) for note in notes] == ["short"]


def test_a_video_with_sound_is_read_for_its_pictures(tmp_path: Path) -> None:
    clip, _ = reader.read_video(write_video(tmp_path / "a.mp4", 8, sound=True), prepare(4, stride=1))
    assert shown(clip) == [2, 3, 4, 5]


def test_reading_twice_gives_the_same_bits_in_threads_as_well(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    first, _ = reader.read_video(path, prepare())
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(reader.read_video(path, prepare())[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all((each == first).all() for each in found)


# --- broken and hostile files -----------------------------------------------------------------------------------------


def test_sound_alone_is_no_picture(tmp_path: Path) -> None:
    assert refused(write_sound(tmp_path / "a.mp4")) == "no picture: sound alone"


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\0" * 4096, b"<html><body>404</body></html>"])
def test_what_is_no_video_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert kind_of(refused(path)) == "not a video, or of an unknown format"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_a_truncated_video_is_refused_or_ends_where_it_was_cut(tmp_path: Path, ending: str, share: float) -> None:
    """An mp4 keeps its table at the end, or at the front and misses what it names; the others end early."""
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    path = write_video(tmp_path / f"a.{ending}", 60, options=options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    found = read_or_why_not(path)
    if isinstance(found, str):
        assert found in ("truncated", "damaged", "not a video, or of an unknown format", "no picture")
    else:
        assert ending != "mp4" or share == 0.9, "its table names frames that are not there: up to eight are forgiven"
        assert max(shown(found)) < 60 * share + 5


def test_an_mp4_cut_before_its_table_is_no_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    path.write_bytes(path.read_bytes()[:-400])
    assert kind_of(refused(path)) in ("not a video, or of an unknown format", "no picture")


def test_noise_in_the_middle_is_refused_or_shown_never_a_crash(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    for trial in range(20):
        broken = bytearray(content)
        for place in random.integers(40, len(broken), size=30):
            broken[place] = int(random.integers(256))
        path.write_bytes(broken)
        found = read_or_why_not(path)
        assert found if isinstance(found, str) else found.shape == (4, 32, 32, 3), trial


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile {secret}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    ],
    ids=["concat", "playlist of a file", "playlist of an address", "a session"],
)
def test_a_file_that_names_others_is_not_followed(tmp_path: Path, text: str) -> None:
    secret = write_video(tmp_path / "secret.mp4", 8)
    path = tmp_path / "a.mp4"
    path.write_text(text.format(secret=secret))
    assert kind_of(refused(path)) == "not a video, or of an unknown format"


def test_a_picture_with_the_name_of_a_video_is_none(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.mp4"
    Image.new("RGB", (64, 48)).save(path, format="PNG")
    assert kind_of(refused(path)) == "not a video, or of an unknown format"


def test_a_container_under_another_name_is_read_as_what_it_is(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 8).rename(tmp_path / "b.mp4")
    assert shown(reader.read_video(path, prepare(4, stride=1))[0]) == [2, 3, 4, 5]


def test_large_frames_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 4)
    monkeypatch.setattr(reader, "MAX_PIXELS", 64 * 48 - 1)
    assert kind_of(refused(path)) == "a decompression bomb"


def test_a_video_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    monkeypatch.setattr(reader, "MAX_FRAMES", 10)
    assert kind_of(refused(path)) == "too long"


def test_a_video_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    monkeypatch.setattr(reader, "SECONDS", -1.0)
    assert kind_of(refused(path)) == "takes too long to read"


def test_a_codec_that_is_not_known_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 4)
    monkeypatch.setattr(reader, "CODECS", ("h264",))
    assert kind_of(refused(path)) == "a codec that is not read"


def test_reading_says_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "a.mp4", 30)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + os.urandom(200) + content[len(content) // 2 + 200 :])
    capfd.readouterr()
    read_or_why_not(path)
    assert capfd.readouterr() == ("", "")


# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (36, 34), (200, 33), (32, 32)])
@pytest.mark.parametrize("share", [1.0, 0.875])
def test_the_middle_of_three_crops_is_the_one_of_an_image(size: tuple[int, int], share: float) -> None:
    from tests.workloads.conftest import noise

    image = noise(size, seed=1)
    frame = Preprocess((32, 32), 3, share, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    left, middle, right = frame.crops(image, 3)
    assert (middle == frame(image)).all() and (frame.crops(image, 1)[0] == middle).all()
    if max(size) > 1.2 * min(size):
        assert (left != middle).any() and (middle != right).any()


def test_crops_reach_from_one_end_of_the_longer_side_to_the_other() -> None:
    picture = np.zeros((32, 96, 3), dtype=np.uint8)
    picture[:, :, 0] = np.arange(96)
    from PIL import Image

    found = FRAME.crops(Image.fromarray(picture), 3)
    assert found[:, 0, 0, 0].tolist() == [0, 32, 64]


def test_a_processor_that_stretches_has_no_crops() -> None:
    squash = Preprocess((32, 32), 3, 1.0, "squash", "bicubic", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(WorkloadError, match="stretches"):
        ClipPreprocess(squash, 4, Sampling(spatial=3))
