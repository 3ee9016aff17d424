"""Placement files: what `recommend` found, loaded for the model at hand, and nothing else believed."""

from __future__ import annotations

import builtins
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from reducers import Count, Drop, EViT, Late, Placement, Ratio, ReducedViT, ReducerError, ToMe, at, load, reduce_tokens
from reducers.digest import state_digest, tensors_digest
from reducers.methods import DynamicViT
from reducers.placement_file import MAX_BYTES, VERSION, placement_text, read_placement_file

from .conftest import DEPTH, make_vit

MODEL = make_vit()
ABOUT: dict[str, Any] = {
    "model": "small_vit", "weights_digest": state_digest(MODEL), "data_digest": "d", "depth": DEPTH, "patches": 36,
    "cost": 0.6, "accuracy": 0.79, "interval": [0.78, 0.8], "sievit": "0.1.0",
}  # fmt: skip
PLACED = at([1, 2], ToMe(Drop(5))) | at([2, 3], EViT(Ratio("2/3"), fuse=False)) | at(3, ToMe(Drop(1)))
TEXT = placement_text(PLACED, ABOUT, name="recommended_0_60", title="0.60 of the dense cost")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "0.60.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def edited(file: Path, *changes: tuple[str, str]) -> Path:
    text = TEXT
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_holds_the_placement_and_what_was_found(file: Path) -> None:
    placement = load(file)
    assert isinstance(placement, Placement) and placement.spec() == PLACED.spec()
    found = read_placement_file(str(file))
    assert found.recommended == {"version": VERSION, **ABOUT} and found.placement.spec() == PLACED.spec()


def test_it_runs_on_its_model_without_a_word(file: Path, images: Tensor) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        expected = reduce_tokens(MODEL, PLACED)(images)
        assert torch.equal(reduce_tokens(MODEL, load(file, MODEL))(images), expected)
        assert torch.equal(reduce_tokens(MODEL, load(file, model=reduce_tokens(MODEL, Placement())))(images), expected)


def test_shares_of_blocks_and_schedules_wait_for_the_model(file: Path) -> None:
    waiting = at({"last": 0.75}, ToMe(Drop(12)), schedule=Late(1))
    file.write_text(placement_text(waiting, {"model": "any"}, name="a", title="A"), encoding="utf-8")
    assert load(file).spec() == waiting.spec()
    here = load(file, MODEL)
    assert here.is_resolved and here.spec() == waiting.resolve(DEPTH, patches=36).spec()


def test_another_models_weights_are_told(file: Path) -> None:
    with pytest.warns(UserWarning, match=r"is for small_vit: this model has other weights\. .*may not hold"):
        placement = load(file, make_vit(seed=1))
    assert placement.spec() == PLACED.spec()


def test_another_number_of_patches_is_told(file: Path) -> None:
    larger = make_vit(img_size=64)
    with pytest.warns(UserWarning, match="other weights and its 64 patches are not the 36"):
        load(file, larger)


def test_another_depth_is_refused(file: Path) -> None:
    with pytest.raises(ReducerError, match=r"is for small_vit, of 4 blocks, and this model has 6; load it with"):
        load(file, make_vit(depth=6))
    file.write_text(placement_text(at(5, ToMe(Drop(1))), {"model": "m"}, name="a", title="A"), encoding="utf-8")
    with pytest.raises(ReducerError, match="outside the network"), warnings.catch_warnings():
        load(file, MODEL)


def test_a_file_of_a_later_version_asks_for_an_update(file: Path) -> None:
    with pytest.raises(ReducerError, match=r"version is 2, and this is read: 1; it was written by a later sievit"):
        load(edited(file, ("version: 1", "version: 2")))
    for other in ("0", "-1", "true", "'1'", "1.0", "null", "[1]"):
        with pytest.raises(ReducerError, match="and this is read: 1; write it again"):
            load(edited(file, ("version: 1", f"version: {other}")))


EDITS: dict[str, tuple[str, str]] = {
    "no block `recommended:`": ("recommended:", "recommends:"),
    "recommended.model must be text": ("model: small_vit", "model: [1]"),
    "recommended.weights_digest must be text": (f"weights_digest: {ABOUT['weights_digest']}", "weights_digest: 3"),
    "recommended.depth must be": ("depth: 4", "depth: 4.5"),
    "whole number from 1 to 1000; got 100000": ("depth: 4", "depth: 100000"),
    "recommended.patches must be": ("patches: 36", "patches: 0"),
    "one arm, and this has none": ("arms:", "arm:"),
    "one arm, and this has none or": ("arms:\n", "arms:\n- {variant: b, stages: []}\n"),
    "no list of stages": ("stages:", "stage:"),
    "did you mean 'tome'": ("name: tome", "name: tomme"),
    "no setting 'fused'": ("fuse: false", "fused: false"),
    "must be true or false": ("fuse: false", "fuse: perhaps"),
    "a share of the tokens": ("ratio: 2/3", "ratio: two thirds"),
    "unknown key 'ratios'": ("ratio: 2/3", "drop: 3, ratios: 2"),
    "block 4 is outside the network": ("at: [1]", "at: [4]"),
    "block 5 is outside the network": ("at: [1]", "at: 3, 5-900"),
    "blocks are written": ("at: [1]", "at: 0-999999999"),
    "a stage is written": ("at: [1]", "to: [1]"),
    "got 'auto'|'auto'": ("drop: 5", "drop: auto"),
    "aliases": ("title:", "title: &a x\nquestion: *a\nother:"),
    "line 3": ("title:", "{title:"),
    "could not determine a constructor": ("title: ", "title: !!python/object/apply:os.system [id] #"),
    "named twice": ("at: [1]", f"at: {list(range(4)) * 400}"),
}  # fmt: skip


@pytest.mark.parametrize("message", EDITS)
def test_an_edit_into_nonsense_is_told_with_cause_and_remedy(message: str, file: Path) -> None:
    with pytest.raises(ReducerError, match=message) as caught:
        load(edited(file, EDITS[message]))
    assert str(caught.value).startswith(f"{file} is no placement file: ")
    assert str(caught.value).endswith("; write it again with `sievit recommend`, or undo the edit")
    assert len(str(caught.value)) < 1200


def test_nothing_in_a_file_is_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "ran"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        with pytest.raises(ReducerError, match="no placement file"):
            load(edited(file, ("cost: 0.6", f"cost: {tag} [{trace}]")))
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, None)
    monkeypatch.setattr(pickle, "loads", None)
    load(edited(file))
    assert not trace.exists()


def test_files_that_would_grow_or_take_long_are_refused_at_once(file: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    stages = "".join("  - {at: 0-3, stack: [{name: tome, budget: {drop: 1}}]}\n" for _ in range(300))
    for text, message in (
        (bomb + TEXT, "aliases"),
        (TEXT + "#" * MAX_BYTES, f"more than {MAX_BYTES} bytes"),
        ("[" * 3000, "line 1: nested too deeply"),
        ("- " * 3000, "line 1: nested too deeply"),
        (TEXT.replace("cost: 0.6", "cost: " + "{a: " * 3000), "line 10: nested too deeply"),
        (TEXT.replace("cost: 0.6", f"cost: {'9' * 50000}"), "not valid YAML"),
        (TEXT.split("  stages:")[0] + "  stages:\n" + stages, "too many"),
        (TEXT.replace("at: [1]", "at: {last: 1e-99999999}"), "share of the blocks"),
        (TEXT.replace("at: [1]", "at: {last: '1e-99999999'}"), "share of the blocks"),
        ("", "no block"),
        ("\x00", "not valid YAML"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ReducerError, match=message):
            load(file)
    file.write_bytes(b"\xff\xfe" + TEXT.encode("utf-16-le"))
    with pytest.raises(ReducerError, match="not UTF-8"):
        load(file)


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ReducerError, match=r"there is no such file; `sievit recommend` writes one"):
            load(path)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slips=st.lists(
        st.tuples(
            st.integers(0, len(TEXT)), st.integers(0, 12), st.text("aezt019-.:,[]{}'\"&*!#%|>\n \t", max_size=6)
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_any_edit_gives_a_placement_or_one_message(file: Path, slips: list[tuple[int, int, str]]) -> None:
    text = TEXT
    for start, length, put in slips:
        text = text[:start] + put + text[start + length :]
    file.write_text(text, encoding="utf-8")
    check_loads_or_says_why(file)


def check_loads_or_says_why(file: Path) -> None:
    try:
        placement = load(file)
    except ReducerError as error:
        said = str(error)
    else:
        assert isinstance(placement, Placement)
        return
    assert said.startswith(str(file)) and "sievit recommend" in said


WORDS = st.sampled_from(["", "tome", "all", "name", "budget", "drop", "auto", "late", "schedule", "1-2", "9e999"])
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), WORDS)


@given(
    value=st.recursive(
        PLAIN,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
        max_leaves=6,
    ),
    place=st.sampled_from([("arms",), ("arms", 0), ("arms", 0, "stages"), ("arms", 0, "stages", 0), ("recommended",),
                     ("arms", 0, "stages", 0, "at"), ("arms", 0, "stages", 0, "stack"),
                     ("arms", 0, "stages", 0, "stack", 0), ("arms", 0, "stages", 0, "stack", 0, "budget"),
                     ("arms", 0, "stages", 0, "stack", 0, "proportional"), ("recommended", "depth")]),
)  # fmt: skip
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_place_gives_a_placement_or_one_message(
    file: Path, value: Any, place: tuple[Any, ...]
) -> None:
    data = yaml.safe_load(TEXT)
    inner = data
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    check_loads_or_says_why(file)


def test_a_count_is_for_the_size_it_was_found_for(file: Path, images: Tensor) -> None:
    """It is not stretched: a warning has said so."""
    file.write_text(placement_text(at(1, ToMe(Count(20))), ABOUT, name="a", title="A"), encoding="utf-8")
    with pytest.warns(UserWarning, match="64 patches"):
        placement = load(file, make_vit(img_size=64))
    assert placement.blocks[1].spec()["budget"] == {"count": 20}


def write_trained(folder: Path, model: ReducedViT) -> Path:
    """A placement file with its reducers' tensors and the model's weights beside it, as `sievit recommend` does."""
    tensors = dict(sorted(model.reducers.state_dict().items()))
    about: dict[str, Any] = {
        **ABOUT,
        "trained": {
            "reducers": {"file": "0.60.reducers.safetensors", "digest": tensors_digest(tensors)},
            "model": {"file": "0.60.model.safetensors", "digest": state_digest(model.base)},
        },
    }
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "0.60.reducers.safetensors")
    file = folder / "0.60.yaml"
    file.write_text(placement_text(model.placement, about, name="a", title="A"), encoding="utf-8")
    return file


@pytest.fixture
def trained_model() -> ReducedViT:
    return reduce_tokens(make_vit(seed=3), at([1, 2], DynamicViT(Ratio(0.6)))).eval()


def test_trained_reducers_come_with_their_tensors(trained_model: ReducedViT, images: Tensor, tmp_path: Path) -> None:
    file = write_trained(tmp_path, trained_model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        fast = reduce_tokens(make_vit(seed=3), load(file, make_vit(seed=3))).eval()
        assert torch.equal(fast(images), trained_model(images))
    with pytest.raises(ReducerError, match=r"comes with trained weights.*load\(path, model\)"):
        load(file)
    with pytest.warns(UserWarning, match=r"has not the weights that were trained, 0.60.model.safetensors beside it"):
        load(file, MODEL)


def test_tensors_beside_a_file_are_checked(trained_model: ReducedViT, tmp_path: Path) -> None:
    file = write_trained(tmp_path, trained_model)
    own, model = tmp_path / "0.60.reducers.safetensors", make_vit(seed=3)
    tensors = load_file(own)
    for change, message in (
        (lambda tensor: tensor + 1, "holds other weights than those that 0.60.yaml was written with"),
        (lambda tensor: tensor[:1].clone(), "does not fit the placement of 0.60.yaml"),
    ):
        save_file({name: change(tensor) for name, tensor in tensors.items()}, own)
        with pytest.raises(ReducerError, match=message):
            load(file, model)
    own.write_bytes(pickle.dumps(tensors))
    with pytest.raises(ReducerError, match="cannot be read"):
        load(file, model)
    own.unlink()
    (tmp_path / "elsewhere").mkdir()
    save_file(tensors, tmp_path / "elsewhere/0.safetensors")
    own.symlink_to(tmp_path / "elsewhere/0.safetensors")
    with pytest.raises(ReducerError, match="no file beside it"):
        load(file, model)
    text = file.read_text(encoding="utf-8")
    for name in ("elsewhere/0.safetensors", "../0.safetensors", str(own), ".safetensors", "a.pt", "a\\b.safetensors"):
        file.write_text(text.replace("0.60.reducers.safetensors", name), encoding="utf-8")
        with pytest.raises(ReducerError, match="is a file beside this one"):
            load(file, model)


@pytest.mark.parametrize(
    ("old", "new"), [("reducers: {", "others: {"), ("digest:", "sum:"), ("trained:", "trained: 3\n  other:")]
)
def test_what_is_said_of_trained_weights_must_be_whole(
    old: str, new: str, trained_model: ReducedViT, tmp_path: Path
) -> None:
    file = write_trained(tmp_path, trained_model)
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ReducerError, match=r"recommended\.trained.*; write it again"):
        load(file, make_vit(seed=3))


def test_how_the_model_is_driven_is_told(file: Path) -> None:
    file.write_text(placement_text(PLACED, {**ABOUT, "host": {"fill": "zero"}}, name="a", title="A"), encoding="utf-8")
    assert yaml.safe_load(file.read_text())["arms"][0]["host"] == {"fill": "zero"}
    with pytest.warns(UserWarning, match=r"reduce_tokens\(model, placement, host=\{'fill': 'zero'\}\)"):
        load(file, MODEL)
    file.write_text(file.read_text().replace("fill: zero", "fill: 3"), encoding="utf-8")
    with pytest.raises(ReducerError, match="recommended.host is written"):
        load(file)
