"""The door to all workloads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ablations.workloads import ModelError, WorkloadError, available_workloads, open_model, open_workload
from tests.workloads.conftest import MakeTree

OPTIONS = {"limit": None, "strict": False, "cache": None}


def test_a_folder_and_its_model_fit_together(make_tree: MakeTree) -> None:
    images = open_workload("imagefolder", data=str(make_tree(count=1)), model="test_vit", **OPTIONS)
    assert images.pixels.shape == (3, 160, 160, 3) and images.classes == 1000 and images.name == "imagefolder"
    loaded = open_model("test_vit", weights="random", workload_name=images.name, classes=images.classes)
    with torch.inference_mode():
        assert loaded.model(images.batch(0, 3)).shape == (3, 1000)


def test_a_finetuned_head_takes_a_folder_of_its_classes(make_tree: MakeTree, tmp_path: Path) -> None:
    finetuned = open_model("test_vit", weights="random", workload_name="imagefolder", classes=2).model
    save_file(finetuned.state_dict(), tmp_path / "two.safetensors")
    weights = str(tmp_path / "two.safetensors")
    root = str(make_tree(("cat", "dog"), count=1))
    images = open_workload("imagefolder", data=root, model="test_vit", weights=weights, **OPTIONS)
    assert images.classes == 2 and images.labels.tolist() == [0, 1]
    with pytest.raises(WorkloadError, match="no WordNet ids"):
        open_workload("imagefolder", data=root, model="test_vit", **OPTIONS)


def test_a_named_data_set_is_opened_through_the_same_door() -> None:
    options = {**OPTIONS, "limit": 2}
    images = open_workload("torchvision:FakeData", data=None, model="test_vit", weights="random", **options)
    assert len(images) == 2 and images.name == "torchvision:FakeData"


@pytest.mark.parametrize("name", ["imagefolders", "tensorflow:mnist", "folder", ""])
def test_an_unknown_workload_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        WorkloadError, match=r"unknown workload .*embedded, embedded:v1, moving_digits, imagefolder, clips, timm:SPEC"
    ) as caught:
        open_workload(name, data=None, model="test_vit", **OPTIONS)
    assert all(kind in str(caught.value) for kind in available_workloads())


def test_an_unknown_model_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ModelError, match="unknown model"):
        open_workload("imagefolder", data="/nowhere", model="resnet_of_dreams", **OPTIONS)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(WorkloadError, match="LIMIT 1 or more"):
        open_workload("imagefolder", data=None, model="test_vit", limit=0, strict=False, cache=None)


def test_the_embedded_workload_refuses_what_it_cannot_use() -> None:
    with pytest.raises(WorkloadError, match="makes its own images"):
        open_workload("embedded", data="/somewhere", model="digits_vit_small", **OPTIONS)
    with pytest.raises(WorkloadError, match="MODEL=pairs_vit_tiny"):
        open_workload("embedded", data=None, model="test_vit", **OPTIONS)
    with pytest.raises(ModelError, match="MODEL=pairs_vit_tiny"):
        open_model("test_vit", weights="random", workload_name="embedded")
    with pytest.raises(ModelError, match="MODEL=digits_vit_small or MODEL=digits_vit_tiny"):
        open_model("test_vit", weights="random", workload_name="embedded:v1")


@pytest.mark.parametrize(
    ("model", "home", "other"),
    [("digits_vit_tiny", "embedded:v1", "embedded"), ("pairs_vit_tiny", "embedded", "embedded:v1")],
)
def test_shipped_weights_are_opened_for_the_scenes_that_they_read(model: str, home: str, other: str) -> None:
    assert open_model(model, weights=None, workload_name=home).weights == "embedded"
    with pytest.raises(ModelError, match=f"read the scenes of WORKLOAD={home}, not those of {other}"):
        open_model(model, weights=None, workload_name=other)
    assert open_model(model, weights="random", workload_name=other).weights == "random"


def test_the_embedded_workload_opens_with_its_masks_and_its_limit() -> None:
    images = open_workload("embedded", data=None, model="digits_vit_tiny", limit=5, strict=True, cache=None)
    assert images.pixels.shape == (5, 64, 64, 1)
    assert images.masks is not None
    assert images.masks.shape == (5, 64, 64)
    loaded = open_model("digits_vit_tiny", weights="random", workload_name="embedded", classes=images.classes)
    with torch.inference_mode():
        assert loaded.model(images.batch(0, 5)).shape == (5, 10)


def test_a_folder_of_ten_classes_suits_a_digits_model(make_tree: MakeTree) -> None:
    root = str(make_tree(tuple("abcdefghij"), count=1, size=(80, 80)))
    images = open_workload("imagefolder", data=root, model="digits_vit_tiny", **OPTIONS)
    digits = open_workload("embedded", data=None, model="digits_vit_tiny", limit=1, strict=False, cache=None)
    assert images.pixels.shape == (10, 64, 64, 1)
    assert (images.mean, images.std) == (digits.mean, digits.std)


def test_weights_of_another_digits_model_are_refused(tmp_path: Path) -> None:
    small = open_model("digits_vit_small", weights="random", workload_name="embedded").model
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ModelError, match="Is digits_vit_tiny the MODEL"):
        open_model("digits_vit_tiny", weights=str(tmp_path / "small.safetensors"), workload_name="embedded")
