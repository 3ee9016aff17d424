"""The small siblings of CvT, PS-ViT, Swin and STViT-R: opened by name, trained as their card says, they read the digit
pairs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ablations.models import paper
from ablations.models.answers import logits_of
from ablations.models.digits import CLASSES, READS, WEIGHTS
from ablations.models.loading import check_model, create_model, head_classes, input_config
from ablations.models.siblings import CVT, PS_VIT, SIBLINGS, STVIT_R, SWIN
from ablations.workloads import ModelError, open_model, pairs, train_siblings
from ablations.workloads.embedded import embedded_workload
from ablations.workloads.train_siblings import CELL, START, begin_from, draw, shown_around, told
from reducers.backbones.ps_vit import PSViT
from reducers.hosts import host_of


def opened(name: str) -> Any:
    return open_model(name, weights="random", workload_name="embedded", classes=10).model


# --- by name ----------------------------------------------------------------------------------------------------------


def test_siblings_are_opened_by_name_and_read_the_digit_pairs() -> None:
    assert {READS[name] for name in SIBLINGS} == {"embedded"}
    for name in SIBLINGS:
        if name == CVT:
            pytest.importorskip("transformers")
        check_model(name)
        assert input_config(name)["input_size"] == (1, 64, 64) and head_classes(name, weights=None) == 10
        logits = opened(name)(torch.zeros(2, 1, 64, 64))
        assert getattr(logits, "logits", logits).shape == (2, 10)
        with pytest.raises(ModelError, match="read the scenes of WORKLOAD=embedded, not those of embedded:v1"):
            open_model(name, weights=None, workload_name="embedded:v1")
        headless = create_model(name, classes=0)(torch.zeros(2, 1, 64, 64))
        assert getattr(headless, "logits", headless).shape == (2, 64)
        with pytest.raises(ModelError, match="reads scenes of 64 px"):
            check_model(f"{name}?img=96")
    with pytest.raises(ModelError, match="did you mean digits_ps_vit_tiny"):
        check_model("digits_psvit_tiny")


def test_without_transformers_the_cvt_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'sievit\[hf\]'"):
        opened(CVT)
    assert isinstance(opened(PS_VIT), PSViT)


def test_the_published_backbones_are_opened_by_name_without_weights(tmp_path: Path) -> None:
    for name in paper.PAPER:
        check_model(name)
        classes = 400 if name.startswith("xvit") else 1000  # Kinetics
        assert head_classes(name, weights=None) == classes and head_classes(name, weights="random") is None
        with torch.device("meta"):
            made = paper.create(name, size=(384, 384) if name == "cvt_21" else None, classes=0)
            assert host_of(made).depth > 9 and host_of(made).image_size[0] == (384 if name == "cvt_21" else 224)
    assert input_config("cvt_21?img=384")["input_size"] == (3, 384, 384)
    assert input_config("ps_vit_b_14")["crop_pct"] == 0.9
    with pytest.raises(ModelError, match="ps_vit_ti_14 comes without weights"):
        open_model("ps_vit_ti_14", weights=None, workload_name="imagefolder")
    with pytest.raises(ModelError, match="does not take images of that size: img_size=90"):
        open_model("ps_vit_ti_14?img=90", weights="random", workload_name="imagefolder")
    loaded = open_model("ps_vit_ti_14", weights="random", workload_name="imagefolder", classes=7)
    assert loaded.model.num_classes == 7 and host_of(loaded.model).depth == 12


def test_weights_under_their_authors_names_are_taken(tmp_path: Path) -> None:
    model = paper.create("ps_vit_ti_14", size=None)
    theirs = {"point_coord": torch.zeros(1, 196, 2)}
    for name, value in model.state_dict().items():
        for ours, authors in (("sampling.", "ps_layers."), ("blocks.", "trans_layers."), ("point_embed", "pos_layer")):
            name = authors + name.removeprefix(ours) if name.startswith(ours) else name
        theirs[name.replace(".block.", ".transformer_layer.").replace(".offset.", ".offset_layer.")] = value
    save_file(theirs, tmp_path / "authors.safetensors")
    path = str(tmp_path / "authors.safetensors")
    found = open_model("ps_vit_ti_14", weights=path, workload_name="imagefolder", classes=1000).model.state_dict()
    for name, value in model.state_dict().items():
        expected = value
        if name.endswith("qkv.weight"):
            expected = torch.cat([value[:192] * 3**-0.5, value[192:]])
        torch.testing.assert_close(found[name], expected)


# --- training ---------------------------------------------------------------------------------------------------------


def test_tokens_are_told_what_lies_where_they_look() -> None:
    pixels, labels, counts, _ = draw(0, 0)
    scenes = [pairs.render("train", index) for index in range(6)]
    assert labels[:6].tolist() == [scene.label for scene in scenes] and (pixels[5] == scenes[5].image).all()
    shown = np.stack([scene.shown for scene in scenes])
    some = torch.from_numpy(counts[:6])
    assert torch.equal(shown_around(some, None), torch.from_numpy(pairs.shown_patches(shown, 8)))
    centres = torch.tensor([[1.0, 1.0], [0.0, 0.0], [7.4, 9.0], [16.0, 3.2], [-4.0, 30.0]]).expand(6, -1, -1)
    found = shown_around(some, centres)
    for image in range(6):
        for token, (y, x) in enumerate(centres[image].round().clamp(0, 16).int().tolist()):
            patch = shown[image, max(CELL * y - 4, 0) : CELL * y + 4, max(CELL * x - 4, 0) : CELL * x + 4]
            held = np.bincount(patch.flatten(), minlength=CLASSES + 1)[:CLASSES]
            assert int(found[image, token]) == (int(held.argmax()) if held.any() else CLASSES)


@pytest.mark.parametrize("name", SIBLINGS)
@torch.no_grad()
def test_what_is_trained_is_what_is_evaluated(name: str) -> None:
    if name == CVT:
        pytest.importorskip("transformers")
    model = opened(name)
    images = torch.randn(2, 1, 64, 64)
    logits, tokens, places = told(name, model, images)
    expected = model(images)
    torch.testing.assert_close(logits, getattr(expected, "logits", expected))
    assert tokens.shape == (2, 64, 64) and (places is None) == (name != PS_VIT)


@torch.no_grad()
def test_stvit_r_begins_from_a_swin_block_by_block() -> None:
    """With blocks that do nothing on semantic tokens, and the same stem, it is the Swin without those blocks."""
    swin, model = opened(SWIN), opened(STVIT_R)
    for parameter in swin.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    begin_from(model, swin.state_dict())
    swin_blocks, (unit,) = swin.layers[2].blocks, model.layers[2].units
    for block, theirs in zip(unit.blocks[1:], swin_blocks[1:], strict=True):
        q, kv = block.attn.q.weight, block.attn.kv.weight
        assert torch.equal(torch.cat([q, kv]), theirs.attn.qkv.weight) and block.ls1.gamma.eq(1).all()
        assert torch.equal(block.mlp.fc2.bias, theirs.mlp.fc2.bias)
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    del swin_blocks[1:]
    model.stem = swin.patch_embed
    images = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(model(images), swin(images))


@pytest.mark.slow
def test_a_training_that_was_interrupted_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_siblings, "EVALUATED", 20)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    torch.set_num_threads(1)
    train_siblings.train(PS_VIT, 192, whole, log_every=1)
    plain, seen = train_siblings.accuracy, []

    def breaks(*arguments: Any) -> float:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(train_siblings, "accuracy", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_siblings.train(PS_VIT, 192, broken, log_every=1)
    train_siblings.train(PS_VIT, 192, broken, resume=True, log_every=1)
    first, second = (load_file(folder / f"{PS_VIT}.safetensors") for folder in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    curves = [json.loads((folder / f"{PS_VIT}.training.json").read_text())["curve"] for folder in (whole, broken)]
    assert [point["loss"] for point in curves[0]] == [point["loss"] for point in curves[1]]


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_the_shipped_weights_are_small_and_have_their_record_and_card() -> None:
    files = [WEIGHTS / f"{name}.safetensors" for name in SIBLINGS]
    assert sum(file.stat().st_size for file in files) <= 5_000_000
    assert sum((WEIGHTS / f"{name}.safetensors").stat().st_size for name in (SWIN, STVIT_R)) <= 2_000_000
    card = (WEIGHTS / "SIBLINGS_CARD.md").read_text(encoding="utf-8")
    for name in SIBLINGS:
        record = json.loads((WEIGHTS / f"{name}.training.json").read_text(encoding="utf-8"))
        assert record["model"] == name and record["scenes"] == train_siblings.SCENES[name]
        assert record.get("start") == START.get(name)
        assert record["curve"][-1]["images"] == record["scenes"] and record["curve"][-1]["cpu_minutes"] <= 45
        assert f"| {name} |" in card and f"{record['scenes']:,}" in card


@pytest.mark.parametrize(
    "name", [PS_VIT, STVIT_R, *(pytest.param(name, marks=pytest.mark.slow) for name in (CVT, SWIN))]
)
@torch.inference_mode()
def test_the_shipped_weights_read_the_digit_pairs_as_their_card_says(name: str) -> None:
    if name == CVT:
        pytest.importorskip("transformers")
    found = re.search(rf"\| {name} \|.* (\d+\.\d) \(\d", (WEIGHTS / "SIBLINGS_CARD.md").read_text(encoding="utf-8"))
    assert found is not None
    loaded, workload = open_model(name, weights=None, workload_name="embedded"), embedded_workload(200)
    assert loaded.weights == "embedded"
    logits = logits_of(loaded.model(workload.batch(0, 200)))
    top1 = float((logits.argmax(1).numpy() == workload.labels).mean())
    assert abs(100 * top1 - float(found[1])) < 5 and float(found[1]) > 90
