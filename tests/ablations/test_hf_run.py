"""A model of transformers, saved in a folder, through a whole run: trials, workers, records, a reproduction."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ablations.run.contexts import load_context, save_context
from ablations.run.session import Settings, open_session
from tests.reducers.hf_models import make_hf

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]

PLACED = """\
name: placed
title: Placements that fit any depth
base:
  x: budget
  stages: [{at: {last: 0.75}, stack: [{name: $method, budget: {ratio: 0.6}}]}]
arms:
  - {variant: top-K, set: {method: topk}}
  - {variant: ATS, set: {method: ats}}
  - variant: ToMe
    x: null
    stages: [{at: {thirds: true}, stack: [{name: tome, budget: {drop: 3}}]}]
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A classifier of seven classes, and a folder of images for each."""
    model, images = tmp_path / "vit", tmp_path / "val"
    make_hf("ViTForImageClassification", dtype=torch.float32).save_pretrained(model)
    told = {
        "do_resize": True, "size": {"height": 48, "width": 48}, "resample": 2, "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (model / "preprocessor_config.json").write_text(json.dumps(told))
    for number in range(14):
        (images / f"class{number % 7}").mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(number).integers(0, 255, (56, 60, 3)).astype(np.uint8)
        Image.fromarray(picture).save(images / f"class{number % 7}" / f"{number}.png")
    return model, images


@pytest.mark.slow
@pytest.mark.parametrize("size", ["", "64"])
def test_a_model_of_transformers_is_run_opened_again_and_reproduced(
    ablate: Callable[..., int], folders: tuple[Path, Path], tmp_path: Path, size: str
) -> None:
    model, images = folders
    (tmp_path / "placed.yaml").write_text(PLACED)
    options = [
        "--specs", tmp_path / "placed.yaml", "--workload", "imagefolder", "--data", images, "--labels", "order",
        "--model", f"hf:{model}", "--weights", "", "--img-size", size, "--limit", "10",
    ]  # fmt: skip
    assert ablate("run", *options) == 0
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == 3
    name = f"hf:{model}" + (f"?img={size}" if size else "")
    assert {row["model"] for row in rows} == {name} and {row["weights"] for row in rows} == {"file"}
    assert {row["variant"]: row["blocks"] for row in rows} == {
        "top-K": [1, 2, 3], "ATS": [1, 2, 3], "ToMe": [1, 2, 3],
    }  # fmt: skip
    patches = 64 if size else 36
    assert all(row["gmacs_mean"] < row["dense_gmacs"] for row in rows)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["patches"] == patches and run["depth"] == 4 and run["classes"] == 7

    settings = Settings(
        tmp_path / "out", "imagefolder", str(images), model=f"hf:{model}", img_size=size or None, labels="order",
        limit=10, batch=4, specs=(str(tmp_path / "placed.yaml"),),
    )  # fmt: skip
    session = open_session(settings)
    assert session.pending() == [], "the same model is the same trials"
    context = load_context(save_context(session, name), torch.device("cpu"))
    assert context.facts == session.facts
    assert ablate("reproduce", rows[0]["key"], "--out", tmp_path / "out") == 0
    assert ablate("report", "--out", tmp_path / "out") == 0


def test_make_passes_the_model_and_the_size_of_image_on() -> None:
    for target in ("ablations", "train"):
        command = ["make", "-n", target, "MODEL=hf:my vit", "IMG_SIZE=384,320", "CONSTRAINTS="]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "--model 'hf:my vit'" in said and "--img-size '384,320'" in said
