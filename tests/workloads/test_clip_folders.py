"""Folders of clips: which are found, which class they are, and what becomes of all else that lies there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablations.workloads.base import NO_LABEL, Workload, WorkloadError
from ablations.workloads.preprocess import Preprocess
from ablations.workloads.reading import Reading
from ablations.workloads.videos import folder, reader
from ablations.workloads.videos.prepare import ClipPreprocess
from ablations.workloads.videos.sampling import Sampling
from tests.workloads.videos import shown, write_frames, write_sound, write_video

FRAME = Preprocess((32, 32), 3, 1.0, "center", "bicubic", (0.5,) * 3, (0.25,) * 3)
NAMES = ("abseiling", "air drumming", "answering questions")


def opened(root: Path, *, sampling: Sampling | None = None, **options: Any) -> Workload:
    prepare = ClipPreprocess(FRAME, 4, sampling or Sampling(stride=2), reader.decoder_version())
    settings: dict[str, Any] = {"head": None, "limit": None, "strict": False, "cache": None, **options}
    return folder.open_clips(str(root), prepare=prepare, **settings)


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    """Two classes of three, in them four videos and a folder of frames."""
    root = tmp_path / "val"
    write_video(root / "air_drumming" / "a.mp4", 12)
    write_video(root / "air_drumming" / "b.avi", 12, first=3)
    write_video(root / "answering questions" / "c.mkv", 12, first=5)
    write_frames(root / "answering questions" / "d", 12)
    return root


def test_videos_and_folders_of_frames_are_clips_of_their_class(kinetics: Path) -> None:
    clips = opened(kinetics)
    assert clips.ids == (
        "air_drumming/a.mp4", "air_drumming/b.avi", "answering questions/c.mkv", "answering questions/d",
    )  # fmt: skip
    assert clips.labels.tolist() == [0, 0, 1, 1] and clips.classes == 2
    assert clips.pixels.shape == (4, 4, 32, 32, 3) and clips.frames == 4 and clips.views == 1
    assert [shown(clip) for clip in clips.pixels] == [[2, 4, 6, 8], [5, 7, 9, 11], [7, 9, 11, 13], [2, 4, 6, 8]]
    assert clips.batch(0, 2).shape == (2, 4, 3, 32, 32)


def test_the_names_of_frames_count_as_numbers(tmp_path: Path) -> None:
    """2.png comes before 10.png."""
    write_frames(tmp_path / "class" / "clip", 12, ending="jpg")
    assert shown(opened(tmp_path).pixels[0]) == [2, 4, 6, 8]


def test_any_subset_of_the_classes_that_the_model_names_can_be_evaluated(kinetics: Path) -> None:
    clips = opened(kinetics, head=3, names=NAMES)
    assert clips.labels.tolist() == [1, 1, 2, 2] and clips.classes == 3


def test_classes_that_are_not_the_models_are_refused(kinetics: Path) -> None:
    with pytest.raises(WorkloadError, match="has 2 classes, but the model's head has 3"):
        opened(kinetics, head=3, names=("a", "b", "c"))
    assert opened(kinetics, head=2, names=("a", "b")).labels.tolist() == [0, 0, 1, 1]


def test_the_validation_split_is_taken_where_all_are_splits(kinetics: Path) -> None:
    write_video(kinetics.parent / "train" / "air_drumming" / "x.mp4", 4)
    assert len(opened(kinetics.parent)) == 4
    with pytest.raises(WorkloadError, match="only a training split"):
        opened(_only_train(kinetics))


def _only_train(kinetics: Path) -> Path:
    root = kinetics.parent / "other"
    write_video(root / "train" / "air_drumming" / "x.mp4", 4)
    return root


def test_views_are_samples_of_one_clip(kinetics: Path) -> None:
    clips = opened(kinetics, sampling=Sampling(2, 2, 3))
    assert clips.views == 6 and clips.pixels.shape == (4, 24, 32, 32, 3) and clips.frames == 4
    batch = clips.batch(1, 3)
    assert batch.shape == (12, 4, 3, 32, 32)
    one = opened(kinetics, sampling=Sampling(2, 2, 1)).batch(1, 2)  # the centre of three crops
    assert (batch[[1, 4]] == one).all()
    assert len({clips.digest, opened(kinetics).digest}) == 2
    assert clips.thumbnail(0).shape == (4 * 32, 32, 3)


def test_nothing_that_is_found_is_lost(kinetics: Path) -> None:
    """Broken, short, copied, of sound alone, of no class: used, left out or skipped, and the three add up."""
    (kinetics / "air_drumming" / "broken.mp4").write_bytes(b"no video")
    write_sound(kinetics / "air_drumming" / "sound.mp4")
    write_video(kinetics / "air_drumming" / "short.mp4", 3, first=9)
    (kinetics / "air_drumming" / "copy.mp4").write_bytes((kinetics / "air_drumming" / "a.mp4").read_bytes())
    (kinetics / "air_drumming" / "notes.txt").write_text("of no interest")
    frames = write_frames(kinetics / "air_drumming" / "torn", 12)
    (frames / "4.png").write_bytes(b"torn")
    write_frames(kinetics / "air_drumming" / "of videos too", 1)
    (kinetics / "air_drumming" / "poster.png").write_bytes((frames / "0.png").read_bytes())
    (kinetics / "empty class").mkdir()
    clips = opened(kinetics)
    reasons = dict(clips.skipped)
    assert reasons.pop("air_drumming/torn").startswith("a frame cannot be used: 4.png, not an image")
    assert {name: reason.partition(":")[0] for name, reason in reasons.items()} == {
        "air_drumming/broken.mp4": "not a video, or of an unknown format",
        "air_drumming/sound.mp4": "no picture",
        "air_drumming/copy.mp4": "a copy",
        "air_drumming/poster.png": "an image beside clips",
    }
    account = clips.account
    assert account is not None and account.as_data(clips.skipped)["found"] == 11  # asserts that the three add up
    assert [name for name, note in account.notes if note.startswith("short")] == [
        "air_drumming/of videos too", "air_drumming/short.mp4",
    ]  # fmt: skip
    assert account.ignored == 1 and account.empty_classes == ("empty class",)
    with pytest.raises(WorkloadError, match="cannot be used"):
        opened(kinetics, strict=True)


def test_a_pipe_is_not_opened(kinetics: Path) -> None:
    os.mkfifo(kinetics / "air_drumming" / "pipe.mp4")
    assert dict(opened(kinetics).skipped)["air_drumming/pipe.mp4"].startswith("not a plain file")


def test_links_are_followed_as_those_of_images_are(kinetics: Path, tmp_path: Path) -> None:
    elsewhere = write_video(tmp_path / "elsewhere" / "e.mp4", 12, first=20)
    (kinetics / "air_drumming" / "e.mp4").symlink_to(elsewhere)
    (kinetics / "air_drumming" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    clips = opened(kinetics)
    assert "air_drumming/e.mp4" in clips.ids and clips.account is not None and clips.account.links == 1
    assert dict(clips.skipped) == {"air_drumming/gone.mp4": "a broken link"}
    inside = opened(kinetics, reading=Reading(links=False))
    assert dict(inside.skipped)["air_drumming/e.mp4"].startswith("a link that leaves the folder")


def test_a_limit_takes_clips_of_every_class(kinetics: Path) -> None:
    clips = opened(kinetics, limit=2)
    assert clips.labels.tolist() == [0, 1] and clips.account is not None and clips.account.left_out == 2


def test_decoded_clips_are_kept_and_found_again(
    kinetics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(kinetics, cache=tmp_path / "cache")
    monkeypatch.setattr(reader, "read_video", None)
    again = opened(kinetics, cache=tmp_path / "cache")
    assert again.digest == first.digest and (np.asarray(again.pixels) == first.pixels).all()
    monkeypatch.undo()
    assert opened(kinetics, cache=tmp_path / "cache", sampling=Sampling(stride=1)).digest != first.digest


def test_without_classes_every_clip_below_the_folder_counts(kinetics: Path, tmp_path: Path) -> None:
    write_frames(kinetics / "of no class", 8)
    clips = opened(kinetics, labelled=False)
    assert len(clips) == 5 and (clips.labels == NO_LABEL).all() and "of no class" in clips.ids


def test_a_folder_without_clips_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    with pytest.raises(WorkloadError, match=r"holds no clips.*\.avi.*a folder of frames"):
        opened(tmp_path)
    write_frames(tmp_path / "frames", 3)
    with pytest.raises(WorkloadError, match="an image beside clips"):  # they lie in a class folder directly
        opened(tmp_path)
    nothing = ClipPreprocess(FRAME, 4, Sampling())
    with pytest.raises(WorkloadError, match="the workload clips needs DATA"):
        folder.open_clips(None, head=None, prepare=nothing, limit=None, strict=False, cache=None)


def test_a_file_of_labels_is_refused(kinetics: Path) -> None:
    with pytest.raises(WorkloadError, match="labelled by their folders"):
        opened(kinetics, reading=Reading(labels=str(kinetics / "val.csv")))


def test_without_pyav_folders_of_frames_are_read_and_videos_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise WorkloadError("videos are decoded by PyAV, which is not installed: pip install 'sievit[video]'")

    write_frames(tmp_path / "class" / "clip", 12)
    write_video(tmp_path / "class" / "a.mp4", 4)
    monkeypatch.setattr(reader, "_av", missing)
    with pytest.raises(WorkloadError, match=r"sievit\[video\]"):
        opened(tmp_path)
    (tmp_path / "class" / "a.mp4").unlink()
    assert len(opened(tmp_path)) == 1
