"""Weights saved from a wrapper around the model are the model's: the wrapper's own names are taken off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ablations.models.digits import create_digits_model
from ablations.models.loading import head_classes, open_model
from ablations.models.weight_files import ModelError, read_shapes
from reducers.digest import state_digest

NAME = "digits_vit_tiny"


def compiled_blocks(model: nn.Module) -> nn.Module:
    for block in range(len(model.blocks)):
        model.blocks[block] = torch.compile(model.blocks[block])
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "compiled and parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "parallel and compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "compiled by block": compiled_blocks,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged and compiled": lambda model: torch.optim.swa_utils.AveragedModel(torch.compile(model)),
}


def made() -> nn.Module:
    torch.manual_seed(3)
    return create_digits_model(NAME)


def saved(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_of_a_wrapper_are_the_models(wrapper, tmp_path):
    plain = made()
    expected = state_digest(plain)
    wrapped = WRAPPERS[wrapper](plain)
    path = saved(wrapped, tmp_path / "weights.safetensors")
    assert list(wrapped.state_dict()) != list(made().state_dict()), "its names are others"
    assert set(read_shapes(path)) == set(made().state_dict())
    loaded = open_model(
        NAME, weights=str(path), workload_name="embedded", classes=head_classes(NAME, weights=str(path))
    )
    assert loaded.digest == expected


def test_the_head_of_a_wrapped_file_is_found(tmp_path):
    import timm

    small = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=7)
    path = saved(torch.compile(small), tmp_path / "weights.safetensors")
    assert head_classes("vit_tiny_patch16_224", weights=str(path)) == 7


def test_weights_of_another_model_in_a_wrapper_are_still_refused(tmp_path):
    path = saved(torch.compile(nn.Linear(2, 3)), tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="do not fit"):
        open_model(NAME, weights=str(path), workload_name="embedded")


def test_two_tensors_of_one_bare_name_are_refused(tmp_path):
    weights = {name: tensor.contiguous() for name, tensor in made().state_dict().items()}
    weights["_orig_mod.head.bias"] = torch.zeros_like(weights["head.bias"])
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="_orig_mod.head.bias"):
        open_model(NAME, weights=str(tmp_path / "weights.safetensors"), workload_name="embedded")


@pytest.mark.parametrize("wrapper", ["compiled", "parallel"])
def test_a_pickled_checkpoint_is_refused_unread_whatever_wrapped_the_model(wrapper, tmp_path):
    torch.save(WRAPPERS[wrapper](made()).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="a zip archive, such as a PyTorch checkpoint"):
        open_model(NAME, weights=str(tmp_path / "weights.pt"), workload_name="embedded")
