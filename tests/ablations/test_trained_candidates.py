"""Trained weights that are given to a search: tried, kept, repeated and handed out; and folders that hold other things.

The model that is searched for has noise in its weights; what was "trained" are the shipped ones, with a DynamicViT.
"""

from __future__ import annotations

import copy
import html
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reducers
from ablations.cli.main import main
from ablations.measure.finetune.given import given_weights
from ablations.measure.opening import Subject, open_subject
from ablations.records.columns import TRAINED
from ablations.run.given import MOST_BYTES, folders_of, keep_given, provide, read_given
from ablations.run.recommend.pieces import Pieces
from ablations.search.errors import SearchError
from ablations.search.parts import part
from ablations.store.store import Store
from ablations.trial.stages import Stages
from ablations.workloads import ImageSource, open_model
from ablations.workloads.embedded import embedded_workload
from analysis.recommendation import write_recommendation
from tests.ablations.test_recommend import IMAGES, few, journal, recommend, results, told  # noqa: F401
from tests.s3 import local_s3

NAME = "pairs_vit_tiny"
STAGES = [{"at": [3, 6, 9], "stack": [{"name": "dynamicvit", "budget": {"ratio": 0.8}}]}]


def shipped() -> Any:
    return open_model(NAME, weights=None, workload_name="embedded", classes=10).model


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that are searched for."""
    path = tmp_path_factory.mktemp("noisy") / "noisy.safetensors"
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: tensor + 0.7 * tensor.std() * torch.randn(tensor.shape, generator=draw) if tensor.ndim > 1 else tensor
        for name, tensor in shipped().state_dict().items()
    }
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def write_training(folder: Path, *, stages: Any = STAGES, seed: int = 1, trained: bool = True) -> Path:
    """What `python -m ablations.measure.finetune` leaves; the predictors' weights are drawn."""
    folder.mkdir(parents=True)
    model = shipped()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fast = reducers.reduce_tokens(model, reducers.placement_from(stages, depth=12))
    own = {name: tensor.clone() for name, tensor in fast.reducers.state_dict().items()}
    if trained:
        save_file(
            {name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "finetuned.safetensors"
        )
    if own:
        save_file(own, folder / "reducers.safetensors")
    record = {
        "model": NAME, "initial_weights": {"kind": "embedded", "digest": "0"},
        "recipe": {"stages": stages, "epochs": 2},
        "training": {"epochs": 2, "train_images": 64, "train_seconds": 1.5, "teacher": True, "digest": "x"},
    }  # fmt: skip
    (folder / "finetune.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training(tmp_path_factory.mktemp("trainings") / "dynamicvit")


@pytest.fixture(scope="module")
def subject(noisy: Path) -> Subject:
    return open_subject(ImageSource(limit=IMAGES), NAME, weights=str(noisy))


def search(out: Path, noisy: Path, *folders: Path, candidates: int = 4, cost: str = "0.7", **more: Any) -> int:
    words = ["--cost", cost, "--weights", str(noisy), "--trained", *map(str, folders)]
    return recommend(out, *words, candidates=candidates, **more)


@pytest.fixture(scope="module")
def found(
    few: None, noisy: Path, training: Path, tmp_path_factory: pytest.TempPathFactory  # noqa: F811
) -> Path:  # fmt: skip
    """A search that was given a training, whole."""
    out = tmp_path_factory.mktemp("found")
    assert search(out, noisy, training) == 0
    return out


@pytest.mark.slow
def test_what_was_trained_is_found_and_python_loads_it(found: Path) -> None:
    (goal,) = told(found)["goals"]
    chosen, comparator = goal["recommended"], goal["comparator"]
    assert goal["better"] and chosen["trained"] and "(trained " in chosen["label"] and "DynamicViT" in chosen["label"]
    assert comparator["trained"] is None and not any(row["trained"] for row in goal["others"])
    assert chosen["share"] <= 0.71

    file, model = found / "recommended/0.70.yaml", shipped()
    model.load_state_dict(load_file(found / "recommended/0.70.model.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        placement = reducers.load(file, model)
    fast, images = reducers.reduce_tokens(model, placement).eval(), embedded_workload(IMAGES)
    confirm = part(images, None).confirmation
    right = [int(fast(images.batch(row, row + 1)).argmax()) == images.labels[row] for row in confirm]
    assert np.mean(right) == pytest.approx(chosen["value"]), "Python gives what was confirmed"


@pytest.mark.slow
def test_the_journal_and_the_store_know_the_weights_by_their_content(found: Path) -> None:
    asked = [event for event in journal(found) if event.get("event") == "asked" and "training" in event]
    assert asked and all("given" in json.loads(event["training"]) for event in asked)
    rows = [row for row in Store(found / "recommend").rows().values() if row["finetuned"]]
    assert rows and all((row["epochs"], row["train_images"], row["teacher"]) == (2, 64, True) for row in rows)
    assert all("given=" in row["code"] and "training=" not in row["code"] for row in rows)


@pytest.mark.slow
def test_the_folder_may_move_and_what_was_chosen_is_reproduced_without_it(
    found: Path, noisy: Path, training: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, moved = (
        Path(shutil.copytree(found, tmp_path / "out")),
        Path(shutil.copytree(training, tmp_path / "else where")),
    )
    (goal,), before = told(out)["goals"], results(out)
    assert search(out, noisy, moved) == 0
    assert results(out) == before and told(out)["goals"] == [goal]
    shutil.rmtree(moved)
    shutil.rmtree(out / "cache")
    assert main(["reproduce", goal["recommended"]["key"], "--out", str(out / "recommend")]) == 0
    assert "bit for bit" in capfd.readouterr().out
    shutil.rmtree(out / "recommend/given")
    assert main(["reproduce", goal["recommended"]["key"], "--out", str(out / "recommend")]) == 2
    assert "search again with --trained FOLDER" in capfd.readouterr().err


@pytest.mark.slow
def test_the_page_says_how_trained_weights_are_used(found: Path) -> None:
    page = html.unescape(write_recommendation(found).read_text())
    assert 'safetensors.torch.load_file("recommended/0.70.model.safetensors")' in page
    assert "weights <code>recommended/0.70.reducers.safetensors</code>" in page and "without training" in page


@pytest.mark.slow
def test_other_weights_are_other_candidates(found: Path, noisy: Path, tmp_path: Path) -> None:
    out, other = Path(shutil.copytree(found, tmp_path / "out")), write_training(tmp_path / "other", seed=2)
    before = results(out)
    assert search(out, noisy, other) == 0
    assert before.items() <= results(out).items()
    fresh = [Store(out / "recommend").load(name.partition(".")[0]) for name in results(out).keys() - before.keys()]
    assert any(row["finetuned"] for row in fresh)
    named = told(out)["trained"]
    assert named != told(found)["trained"] and len(named) == 1


@pytest.mark.slow
@pytest.mark.parametrize("after", [4, 6])
def test_killed_in_the_middle_it_goes_on(
    after: int, found: Path, noisy: Path, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, look = 0, Pieces.look

    def killed(self: Pieces, *given: Any) -> Any:
        nonlocal looked
        looked += 1
        if looked > after:
            raise KeyboardInterrupt
        return look(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Pieces, "look", killed)
        assert search(tmp_path, noisy, training) == 130
    before = results(tmp_path)
    assert before and search(tmp_path, noisy, training) == 0
    assert journal(tmp_path) == journal(found) and told(tmp_path)["goals"] == told(found)["goals"]
    assert before.items() <= results(tmp_path).items()


@pytest.mark.slow
def test_on_ray_workers_find_the_weights(found: Path, noisy: Path, training: Path, tmp_path: Path) -> None:
    assert search(tmp_path, noisy, training, how="--workers=2") == 0
    (one,), (other,) = told(found)["goals"], told(tmp_path)["goals"]
    assert one["recommended"]["trained"] == other["recommended"]["trained"]
    rows = [{row["key"]: row for row in Store(out / "recommend").rows().values()} for out in (found, tmp_path)]
    both = [key for key in rows[0].keys() & rows[1].keys() if rows[0][key]["finetuned"]]
    assert both and all(rows[0][key]["top1"] == rows[1][key]["top1"] for key in both)


@pytest.mark.slow
def test_a_cost_that_it_does_not_reach_is_told(
    noisy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """At block 11 nothing that acts can save half of the cost."""
    late = write_training(tmp_path / "late", stages=[{"at": [11], "stack": STAGES[0]["stack"]}])
    assert search(tmp_path / "out", noisy, late, candidates=1, cost="0.5") == 0
    assert "is left out: it cannot cost 0.5 of the dense model" in caplog.text
    (goal,) = told(tmp_path / "out")["goals"]
    assert any("trained" in label for label, _ in goal["left_out"])


@pytest.mark.slow
def test_a_real_training_goes_from_the_command_into_a_search(tmp_path: Path, few_scenes: None) -> None:
    """Nothing but the folder that `python -m ablations.measure.finetune` wrote; what it holds is what is evaluated."""
    from ablations.measure.finetune.__main__ import main as finetune

    words = ["--out", str(tmp_path / "t"), "--model", NAME, "--limit", "8", "--device", "cpu", "--workers", "0"]
    recipe = ["epochs=1", "images=8", "batch=4", "holdout=0"]
    assert finetune([*words, "--no-evaluation", "--stages", json.dumps(STAGES), "--set", *recipe]) == 0
    assert recommend(tmp_path / "out", "--cost", "0.5", "--trained", str(tmp_path / "t"), candidates=3) == 0
    rows = [row for row in Store(tmp_path / "out/recommend").rows().values() if row["finetuned"]]
    assert rows and rows[0]["train_images"] == 8 and json.loads(rows[0]["training"])["stages"] == STAGES


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_what_is_kept_is_made_whole_again_and_never_believed_by_its_name(
    training: Path, subject: Subject, tmp_path: Path
) -> None:
    given, store = read_given(training, subject), Store(tmp_path / "out").create()
    keep_given(given, store)
    plain = subject.loaded.model
    provide(given.training, store, tmp_path / "cache", plain)
    for file in (tmp_path / "cache/given").glob("*.safetensors"):
        file.unlink()  # the same file as the one that is kept
        file.write_bytes(b"\0" * 64)
    provide(given.training, store, tmp_path / "cache", plain)
    tuned = given_weights(given.training, plain, tmp_path / "cache/given")
    assert torch.equal(tuned.model.head.weight, shipped().head.weight)
    kept = sorted((tmp_path / "out/given").glob("*.safetensors"))
    other = {name: tensor + 1 for name, tensor in load_file(kept[0]).items()}
    save_file(other, kept[0])
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds other weights than its name says"):
        provide(given.training, store, tmp_path / "cache", plain)
    keep_given(given, store)
    provide(given.training, store, tmp_path / "cache", plain)


@pytest.mark.slow
def test_what_is_kept_in_an_object_store_is_fetched(
    training: Path, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node does that shares no disk with the driver."""
    monkeypatch.setenv("SIEVIT_CACHE", str(tmp_path / "home"))
    with local_s3() as bucket:
        given, store = read_given(training, subject), Store(f"{bucket}/out").create()
        keep_given(given, store)
        provide(given.training, Store(f"{bucket}/out"), tmp_path / "node", subject.loaded.model)
        assert len(list((tmp_path / "node/given").iterdir())) == 3
        with pytest.raises(ValueError, match=r"are not in s3://.*/none/given .*search again with --trained FOLDER"):
            provide(given.training, Store(f"{bucket}/none"), tmp_path / "other", subject.loaded.model)


def test_weights_that_were_held_still_are_not_kept_twice(subject: Subject, noisy: Path, tmp_path: Path) -> None:
    folder = write_training(tmp_path / "frozen")
    shutil.copy(noisy, folder / "finetuned.safetensors")
    given = read_given(folder, subject)
    digests = json.loads(given.training.text)["given"]
    assert digests["model"] == "" and digests["reducers"] and len(given.tensors) == 1


def test_both_commands_records_are_read(training: Path, subject: Subject, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(training, tmp_path / "train"))
    record = json.loads((folder / "finetune.json").read_text())
    (folder / "finetune.json").unlink()
    method = {"training": json.dumps(record["recipe"]), "train_images": 64, "train_seconds": 1.5, "reducer": "[]"}
    (folder / "train.json").write_text(json.dumps({"model": NAME, "results": {"method": method}}))
    one, other = read_given(training, subject), read_given(folder, subject)
    assert one.training == other.training and other.facts["epochs"] == 2
    assert tuple(one.facts) == TRAINED
    assert Stages.of(one.training.data["stages"]).plain() == STAGES


def test_folders_with_spaces_and_several_in_one_word(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    assert folders_of([str(tmp_path / "a b"), "x y", "x"]) == [tmp_path / "a b", Path("x"), Path("y")]


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / "finetune.json").read_text())
        change(record)
        (folder / "finetune.json").write_text(json.dumps(record))

    return edit


def _smaller(folder: Path) -> None:
    tensors = load_file(folder / "finetuned.safetensors")
    save_file(
        {name: tensor[..., :8].contiguous() for name, tensor in tensors.items()}, folder / "finetuned.safetensors"
    )


def _scaled(folder: Path) -> None:
    tensors = load_file(folder / "reducers.safetensors")
    save_file({name: tensor * np.inf for name, tensor in tensors.items()}, folder / "reducers.safetensors")


def _linked(name: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return link


HOSTILE: dict[str, Callable[[Path], object]] = {
    "is no folder of a training": shutil.rmtree,
    "holds neither finetune.json nor train.json": lambda folder: (folder / "finetune.json").unlink(),
    "is no record of a training": lambda folder: (folder / "finetune.json").write_text("[" * 10000),
    "epochs is '2'": _edit(lambda record: record["recipe"].update(epochs="2")),
    "attention is 'mask": _edit(lambda record: record["training"].update(attention="mask" * 20)),
    "the placement of its training is none for": _edit(lambda record: record["recipe"].update(stages=[{"at": [99]}])),
    "the placement of its training is none": _edit(lambda record: record["recipe"].update(stages="topk")),
    "a budget of it is auto": _edit(
        lambda record: record["recipe"].update(
            target=0.5, stages=[{"at": [3], "stack": [{"name": "topk", "budget": {"ratio": "auto"}}]}]
        )
    ),
    "no reducer was active": _edit(lambda record: record["recipe"].update(stages=[])),
    "needs the weights": _edit(lambda record: record["recipe"].update(stages=[{**STAGES[0], "at": [3, 6, 10]}])),
    "finetuned.safetensors cannot be read": lambda folder: (folder / "finetuned.safetensors").unlink(),
    "only format that is read": lambda folder: (folder / "finetuned.safetensors").write_bytes(b"\x80\x04pickle" * 9),
    "do not fit pairs_vit_tiny": _smaller,
    "is a training of deit_tiny": lambda folder: (
        _smaller(folder), _edit(lambda record: record.update(model="deit_tiny_patch16_224"))(folder)
    ),
    "is not finite": _scaled,
    "reducers.safetensors does not belong": lambda folder: (folder / "reducers.safetensors").unlink(),
    "reducers.safetensors is a link": _linked("reducers.safetensors"),
    "finetuned.safetensors is a link": _linked("finetuned.safetensors"),
    "finetune.json is a link": _linked("finetune.json"),
}  # fmt: skip


@pytest.mark.parametrize("message", HOSTILE)
def test_what_is_no_training_is_one_message(message: str, training: Path, subject: Subject, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(training, tmp_path / "t"))
    HOSTILE[message](folder)
    with pytest.raises(SearchError) as caught:
        read_given(folder, subject)
    assert message in str(caught.value) and str(folder) in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(
    training: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for name in MOST_BYTES:
        with monkeypatch.context() as patched:
            patched.setitem(MOST_BYTES, name, 100)
            with pytest.raises(SearchError, match=f"{name} has .* at most 100"):
                read_given(training, subject)


def test_features_are_no_question_for_trained_weights(
    training: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--cost", "0.5", "--task", "embed", "--out", str(tmp_path), "--trained", str(training)]
    assert main(["recommend", "--serial", *words]) == 2
    assert "search with --task classify" in capfd.readouterr().err


# --- the placement file -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_placement_file_says_what_is_missing_of_its_weights(found: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(found / "recommended", tmp_path / "there"))
    file, own, model = there / "0.70.yaml", there / "0.70.reducers.safetensors", shipped()
    with pytest.raises(reducers.ReducerError, match=r"comes with trained weights.*load\(path, model\)"):
        reducers.load(file)
    other = copy.deepcopy(model)
    other.head.weight.data += 1
    with pytest.warns(UserWarning, match=r"has not the weights that were trained, 0.70.model.safetensors beside it"):
        reducers.load(file, other)
    tensors = load_file(own)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, own)
    with pytest.raises(reducers.ReducerError, match="holds other weights than those"):
        reducers.load(file, model)
    save_file({name: tensor[:1].contiguous() for name, tensor in tensors.items()}, own)
    with pytest.raises(reducers.ReducerError, match="does not fit the placement"):
        reducers.load(file, model)
    own.write_bytes(b"\x80")
    with pytest.raises(reducers.ReducerError, match="cannot be read"):
        reducers.load(file, model)
    own.unlink()
    save_file(tensors, tmp_path / "outside.safetensors")
    own.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(reducers.ReducerError, match="no file beside it"):
        reducers.load(file, model)
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), ".safetensors", "a.pt"):
        file.write_text((found / "recommended/0.70.yaml").read_text().replace("0.70.reducers.safetensors", name))
        with pytest.raises(reducers.ReducerError, match="is a file beside this one"):
            reducers.load(file, model)


@pytest.mark.slow
def test_a_run_refuses_a_placement_that_comes_with_weights(found: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(found / "recommended/0.70.yaml")]) != 0
    said = "".join(capfd.readouterr())
    assert "comes with trained weights, which no run reads" in said
