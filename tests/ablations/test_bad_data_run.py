"""A whole run over a folder in which everything is wrong: it ends well, and run.json and the report say how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ablations.workloads import open_model
from analysis import page
from analysis.__main__ import main as draw
from tests.analysis.conftest import plainly

Ablate = Callable[..., int]
WNIDS = ("n01440764", "n01484850", "n01491361")


def picture(path: Path, seed: int, mode: str = "RGB", **options) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (160, 160, 3)).astype(np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six good pictures of two classes, a class without any, and one of every kind of fault."""
    root = tmp_path / "images"
    for number, wnid in enumerate(WNIDS):
        (root / wnid).mkdir(parents=True)
        for image in range(3 if number < 2 else 0):
            picture(root / wnid / f"good{image}.png", 10 * number + image)
    first, second = root / WNIDS[0], root / WNIDS[1]
    (first / "broken.png").write_bytes(b"not an image")
    (first / "short.png").write_bytes((first / "good0.png").read_bytes()[:5000])
    shutil.copy(first / "good1.png", first / "good1_copy.png")
    for place in (first, second):
        picture(place / "in_both.png", 99)
    picture(tmp_path / "outside.png", 100)
    (second / "escape.png").symlink_to(tmp_path / "outside.png")
    Image.new("RGB", (1, 1)).save(second / "dot.png")
    picture(second / "cmyk.jpg", 101, mode="CMYK")
    picture(second / "palette.png", 102, mode="P")
    picture(second / "is_png.jpg", 103, format="PNG")
    return root


@pytest.fixture
def options(folder: Path, spec_path: Path) -> list[str | Path]:
    spec_path.write_text(spec_path.read_text().replace("[48, 96]", "[48]").replace("at: 3", "at: 1"))
    return ["--specs", spec_path, "--workload", "imagefolder", "--data", folder, "--model", "test_vit", "--no-links"]


def test_a_run_over_bad_data_ends_well_and_says_what_it_left_out(
    ablate: Ablate, options: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert ablate("run", *options, "--limit", "100") == 0
    run = json.loads((out / "run.json").read_text())
    account = run["images_account"]
    assert account["skipped"] == {
        "not an image, or of an unknown format": 1, "truncated": 1, "a copy": 1, "the same file in two classes": 2,
        "a link that leaves the folder": 1, "no picture": 1,
    }  # fmt: skip
    assert account["noted"] == {"CMYK colours": 1, "a palette": 1, "another format than the name says": 1}
    assert account["empty_classes"] == [WNIDS[2]]
    assert (account["found"], account["used"]) == (16, 9) and len(run["skipped"]) == 7
    assert run["images"] + run["calibration_images"] == 9
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok"] and {row["images"] for row in rows} == {run["images"]}
    monkeypatch.setattr(page, "save_figure", plainly)
    assert draw([str(out), "--quiet"]) == 0
    report = (out / "report.html").read_text(encoding="utf-8")
    used = f"9 are used ({run['calibration_images']} only to calibrate)"
    assert f"Of 16 images found, {used} and 7 skipped." in report
    assert "<td>the same file in two classes</td><td>2</td><td>skipped</td>" in report
    assert "<td>CMYK colours</td><td>1</td><td>read and used</td>" in report
    assert f"No image that can be used in {WNIDS[2]}" in report


def test_strict_refuses_the_same_folder_before_anything_is_computed(
    ablate: Ablate, options: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", *options, "--limit", "100", "--strict") == 2
    said = capsys.readouterr().err
    assert "7 image(s) cannot be used" in said and "without --strict" in said and "Traceback" not in said
    assert not any((tmp_path / "out" / "trials").iterdir())


@pytest.mark.parametrize("fault", ["missing", "unexpected", "nan", "classes", "pickle"])
def test_bad_weights_end_a_run_before_it_begins(
    fault: str, ablate: Ablate, options: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(open_model("test_vit", weights="random", workload_name="imagefolder", classes=1000).model.state_dict())
    path = tmp_path / "bad.safetensors"
    expected = {
        "missing": "1 missing (norm.weight (64,))",
        "unexpected": "1 unexpected (extra (2,))",
        "nan": "head.bias in",
        "classes": "the model's head has 10",
        "pickle": "no safetensors file",
    }[fault]
    match fault:
        case "missing":
            del state["norm.weight"]
        case "unexpected":
            state["extra"] = torch.zeros(2)
        case "nan":
            state["head.bias"] = torch.full_like(state["head.bias"], float("nan"))
        case "classes":
            state.update({"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)})
    if fault == "pickle":
        torch.save(state, path)
    else:
        save_file(state, path)
    assert ablate("run", *options, "--weights", str(path)) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not (tmp_path / "out" / "results.parquet").exists()
