"""Labels from a file in a whole run: workers, the record and a reproduction read the images as the run did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ablations.run.contexts import load_context, make_context, save_context
from ablations.run.session import Settings, open_session
from ablations.workloads import Reading, WorkloadError
from analysis.account import read_account


def test_a_run_is_opened_again_and_reproduced_with_the_same_labels(
    ablate: Callable[..., int], spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "flat").mkdir()
    for number in range(8):
        picture = np.random.default_rng(number).integers(0, 255, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "pool" / f"{number}.png")
        (tmp_path / "flat" / f"{number}.png").symlink_to(tmp_path / "pool" / f"{number}.png")
    labels = tmp_path / "mine.txt"
    labels.write_text("".join(f"{number}.png {100 + number}\n" for number in range(8)))
    spec_path.write_text(spec_path.read_text().replace("[48, 96]", "[48]").replace("at: 3", "at: 1"))
    spec_path.write_text(spec_path.read_text().partition("  - {variant: top-K")[0])
    monkeypatch.chdir(tmp_path)
    options = ["--specs", spec_path, "--workload", "imagefolder", "--data", "flat", "--model", "test_vit"]
    with pytest.raises(WorkloadError, match="LABELS=FILE"):
        open_session(Settings(tmp_path / "none", "imagefolder", "flat", model="test_vit", weights="random"))
    assert ablate("run", *options, "--labels", "mine.txt") == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["labels"] == str(labels) and run["images_account"]["links"] == 8
    account = read_account(run)
    assert account is not None
    assert account.summary.endswith(
        "0 skipped; 8 of those found are links or lie behind links; their labels are those of mine.txt."
    )

    settings = Settings(
        tmp_path / "out", "imagefolder", "flat", model="test_vit", weights="random", labels="mine.txt", limit=10,
        batch=4, specs=(str(spec_path),),
    )  # fmt: skip
    session = open_session(settings)
    assert session.pending() == [], "the same labels are the same trials"
    assert make_context(session, torch.device("cpu")).source.reading == Reading(str(labels))
    again = load_context(save_context(session, "test_vit"), torch.device("cpu"))
    assert again.source.reading == Reading(str(labels)) and again.workload.labels.min() >= 100

    monkeypatch.chdir("/")
    (key,) = (path.stem for path in (tmp_path / "out" / "trials").glob("*.parquet"))
    assert ablate("reproduce", key, "--out", tmp_path / "out") == 0
    labels.rename(tmp_path / "moved.txt")
    assert ablate("reproduce", key, "--out", tmp_path / "out") == 2
    assert ablate("reproduce", key, "--out", tmp_path / "out", "--labels", tmp_path / "moved.txt") == 0
    (tmp_path / "moved.txt").write_text((tmp_path / "moved.txt").read_text().replace("3.png 103", "3.png 104"))
    assert ablate("reproduce", key, "--out", tmp_path / "out", "--labels", tmp_path / "moved.txt") == 2
