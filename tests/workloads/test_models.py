"""Models by name, and weights that fit, do not fit, or are no weights at all."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from ablations.models.digits import FROM_SCRATCH
from ablations.models.loading import check_model, head_classes, input_config
from ablations.workloads import ModelError, open_model
from reducers import at, reduce_tokens
from reducers.methods import HVTPool

NAME = "test_vit"  # timm's model for tests: 0.4 M parameters, 160 x 160 pixels


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return timm.create_model(NAME).state_dict()


@pytest.fixture
def weights_file(state: dict[str, Tensor], tmp_path: Path):
    """Write the model's weights with some changed: a tensor replaces, None removes."""

    def write(**changes: Tensor | None) -> str:
        changed = {**state, **{key.replace("__", "."): value for key, value in changes.items()}}
        save_file({key: value for key, value in changed.items() if value is not None}, tmp_path / "w.safetensors")
        return str(tmp_path / "w.safetensors")

    return write


def opened(weights: str | None, **options):
    return open_model(NAME, weights=weights, workload_name="imagefolder", **options)


# -- names


def test_an_unknown_model_names_the_nearest_ones() -> None:
    with pytest.raises(ModelError, match="did you mean .*deit_tiny_patch16_224"):
        check_model("deit_tiny_patch16_242")
    with pytest.raises(ModelError, match="did you mean digits_vit_small"):
        check_model("digit_vit_smal")
    with pytest.raises(ModelError, match="lists the names"):
        check_model("§§")


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_models_that_are_trained_from_scratch_come_without_weights(name: str) -> None:
    """HVT's: no class token, the final norm and then the mean over the tokens."""
    with pytest.raises(ModelError, match="trained from scratch: give WEIGHTS=random"):
        open_model(name, weights=None, workload_name="embedded")
    model = open_model(name, weights="random", workload_name="embedded", classes=10).model
    images = torch.randn(2, 1, 64, 64)
    tokens = model.forward_features(images)
    assert tokens.shape[1] == 64
    torch.testing.assert_close(model(images), model.head(tokens.mean(1)))
    pooled = reduce_tokens(model, at([1, 4, 7, 10], HVTPool(site="input", positions=True)))
    assert pooled.trace(images)[1].tokens[0].tolist() == [64, 64, 31, 31, 31, 15, 15, 15, 7, 7, 7, 3, 3]


def test_an_unknown_tag_names_the_tags_there_are() -> None:
    with pytest.raises(ModelError, match="choose among deit_tiny_patch16_224.fb_in1k"):
        check_model("deit_tiny_patch16_224.imaginary")


def test_names_of_other_sources_are_unknown() -> None:
    for name in ("hub:someone/model", "https://somewhere/model"):
        with pytest.raises(ModelError, match="unknown source"):
            check_model(name)


def test_the_input_of_a_model_is_what_timm_says() -> None:
    config = input_config("deit_tiny_patch16_224")
    model = timm.create_model("deit_tiny_patch16_224")
    assert config == timm.data.resolve_model_data_config(model)
    assert config["crop_pct"] == 0.9 and config["interpolation"] == "bicubic"


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="without a classifier"):
        head_classes("vit_small_patch14_dinov2", weights=None)


# -- weights that fit


def test_weights_from_a_file_give_the_models_own_outputs(state, weights_file) -> None:
    loaded = opened(weights_file(), classes=1000)
    reference = timm.create_model(NAME)
    reference.load_state_dict(state)
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), reference.eval()(images), atol=0, rtol=0)
    assert loaded.weights == "file" and not loaded.model.training
    assert loaded.params_m == pytest.approx(sum(p.numel() for p in reference.parameters()) / 1e6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(state, weights_file, dtype: torch.dtype) -> None:
    loaded = opened(weights_file(**{key: value.to(dtype) for key, value in state.items()}))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    expected = state["head.weight"].to(dtype).float()
    torch.testing.assert_close(loaded.model.head.weight.detach(), expected, atol=0, rtol=0)


def test_the_digest_follows_the_weights_and_not_the_file(state, weights_file, tmp_path: Path) -> None:
    first = opened(weights_file())
    shutil.copy(tmp_path / "w.safetensors", tmp_path / "copy.safetensors")
    assert first.digest == opened(str(tmp_path / "copy.safetensors")).digest
    changed = state["norm.weight"].clone()
    changed[0] += 1e-6
    assert first.digest != opened(weights_file(norm__weight=changed)).digest


def test_random_weights_are_seeded_and_leave_the_callers_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = opened("random")
    torch.testing.assert_close(torch.rand(3), expected)
    assert first.weights == "random"
    assert first.digest == opened("random").digest != opened("random", seed=1).digest


def test_a_random_head_is_made_to_fit_the_labels() -> None:
    assert head_classes(NAME, weights="random") is None
    assert opened("random", classes=7).model.num_classes == 7


def test_a_file_decides_how_many_classes_its_head_has(weights_file) -> None:
    path = weights_file(head__weight=torch.zeros(10, 64), head__bias=torch.zeros(10))
    assert head_classes(NAME, weights=path) == 10
    assert opened(path, classes=10).model.num_classes == 10


def test_hub_weights_that_are_already_here_need_no_network(state, tmp_path: Path) -> None:
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    loaded = opened(None, hub_cache=tmp_path, classes=1000)
    assert loaded.weights == "hub"
    torch.testing.assert_close(loaded.model.head.weight.detach(), state["head.weight"], atol=0, rtol=0)


# -- weights that do not fit


def test_missing_and_unexpected_names_are_listed_with_their_shapes(weights_file) -> None:
    path = weights_file(norm__weight=None, norm__bias=None, extra=torch.zeros(2, 3))
    with pytest.raises(
        ModelError,
        match=r"2 missing \(norm\.weight \(64,\), norm\.bias \(64,\)\); 1 unexpected \(extra \(2, 3\)\)",
    ):
        opened(path)


def test_another_shape_names_both_shapes_and_doubts_the_model(weights_file) -> None:
    with pytest.raises(ModelError, match=r"norm\.weight is \(9,\), the model's \(64,\).*Is test_vit the MODEL"):
        opened(weights_file(norm__weight=torch.zeros(9)))


def test_the_list_of_problems_is_kept_short(state, weights_file) -> None:
    with pytest.raises(ModelError, match=r"and \d+ more\)") as caught:
        opened(weights_file(**{key: None for key in state if key.startswith("blocks")}))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(state, weights_file, value: float) -> None:
    broken = state["head.bias"].clone()
    broken[3] = value
    with pytest.raises(ModelError, match=r"head\.bias in .* holds 1 values that are NaN or infinite"):
        opened(weights_file(head__bias=broken))


def test_values_too_large_for_the_model_are_refused(state, weights_file) -> None:
    huge = state["head.bias"].double()
    huge[5] = 1e300
    with pytest.raises(ModelError, match=r"head\.bias in .* holds 1 values that are NaN or infinite \(or too large"):
        opened(weights_file(head__bias=huge))


def test_quantised_weights_are_refused(state, weights_file) -> None:
    with pytest.raises(ModelError, match=r"norm\.weight in .*torch\.int8: quantised"):
        opened(weights_file(norm__weight=torch.ones(64, dtype=torch.int8)))


def test_a_head_for_other_classes_is_refused(weights_file) -> None:
    with pytest.raises(ModelError, match=r"head of test_vit has 1000 classes, the labels of imagefolder have 10"):
        opened(weights_file(), classes=10)


def test_a_checkpoint_of_another_model_is_refused(weights_file) -> None:
    with pytest.raises(ModelError, match="Is deit_tiny_patch16_224 the MODEL"):
        open_model("deit_tiny_patch16_224", weights=weights_file(), workload_name="imagefolder")


# -- files that are no weights


def test_a_pickled_checkpoint_is_refused_unopened(state, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"no safetensors file.*zip archive.*safetensors\.torch\.save_file"):
        opened(str(tmp_path / "model.pth"))


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_dressed_as_safetensors_is_never_run(tmp_path: Path) -> None:
    dressed = tmp_path / "model.safetensors"
    dressed.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ModelError, match="a Python pickle"):
        opened(str(dressed))
    assert not (tmp_path / "ran").exists()


def poisoned(path: Path, trap: Trap, kind: str) -> None:
    """A checkpoint that would leave a file behind if anything in it were unpickled."""
    if kind.startswith("protocol"):
        path.write_bytes(pickle.dumps(trap, protocol=int(kind[-1])))
    elif kind == "torch":
        torch.save({"head.weight": trap}, path)
    elif kind == "torch before zip":
        torch.save({"head.weight": trap}, path, _use_new_zipfile_serialization=False)
    elif kind == "numpy":
        with path.open("wb") as file:
            np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    elif kind == "tar":
        inner = path.with_suffix(".pkl")
        inner.write_bytes(pickle.dumps(trap))
        with tarfile.open(path, "w") as archive:
            archive.add(inner)
    else:  # a header of the right form, the pickle where the tensors should be
        content = pickle.dumps(trap)
        header = json.dumps({"head.weight": {"dtype": "F32", "shape": [1000, 64], "data_offsets": [0, len(content)]}})
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + content)


@pytest.mark.parametrize(
    "kind",
    [*(f"protocol {number}" for number in range(6)), "torch", "torch before zip", "numpy", "tar", "behind a header"],
)
def test_no_checkpoint_that_can_run_code_is_ever_opened_whatever_it_calls_itself(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    poisoned(path, Trap(tmp_path / "ran"), kind)
    for reads in (lambda: head_classes(NAME, weights=str(path)), lambda: opened(str(path))):
        with pytest.raises(ModelError, match="no safetensors file, the only format that is read"):
            reads()
    assert not (tmp_path / "ran").exists()


def test_the_trap_springs_where_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "else the tests above would show nothing"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header is missing"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{not js}", "header"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "header"),
    ],
)
def test_anything_else_is_refused_with_what_it_seems_to_be(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=f"(?i)no safetensors file.*{reason}"):
        opened(str(tmp_path / "w.safetensors"))


def test_a_truncated_file_is_refused(weights_file) -> None:
    path = Path(weights_file())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="no safetensors file"):
        opened(str(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist: give a .safetensors file, or WEIGHTS=random"):
        opened(str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ModelError, match="is a folder"):
        opened(str(tmp_path))


def test_without_a_network_the_hub_names_what_to_give_instead(tmp_path: Path) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "the tests' conftest keeps them off the network"
    with pytest.raises(ModelError, match=r"cannot be fetched.*WEIGHTS=file\.safetensors, or WEIGHTS=random"):
        opened(None, hub_cache=tmp_path)


def test_a_model_the_hub_has_no_weights_for_says_so() -> None:
    with pytest.raises(ModelError, match="timm has no weights for davit_huge"):
        open_model("davit_huge", weights=None, workload_name="imagefolder")
