"""A finished training is kept by what it was trained from, and done once."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ablations.measure.finetune import __main__ as command
from ablations.measure.finetune import cache as trainings
from ablations.measure.finetune import finetuned, trained_model
from ablations.measure.finetune.loop import FinetuneError
from ablations.precision import Arithmetic
from ablations.trial.stages import HostOptions
from ablations.workloads import ImageSource, embedded, open_model
from reducers import ATS, Count, at, placement_from, reduce_tokens
from reducers.hosts.protocol import HostBlock
from reducers.hosts.timm_vit import TimmViT
from tests.finetune import taught
from tests.finetune.conftest import ATS as STAGE
from tests.finetune.conftest import CPU, tiny_model

TRAINING = json.dumps(
    {"stages": [STAGE], "epochs": 2, "images": 8, "batch": 4, "holdout": 4, "seed": 3}, sort_keys=True
)


pytestmark = pytest.mark.usefixtures("few_scenes")


@pytest.fixture
def context(tmp_path: Path) -> SimpleNamespace:
    """What a trial's context holds, as far as a training asks."""
    return SimpleNamespace(
        workload=embedded.embedded_workload(limit=2), model=tiny_model(), device=CPU, source=ImageSource(),
        facts=SimpleNamespace(name="tiny", weights_digest="w" * 64, classes=10), cache=tmp_path,
        beat=lambda: None, arithmetic=None,
    )  # fmt: skip


def test_a_training_is_done_once_and_kept(context: Any, tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    first = finetuned(TRAINING, context, report=reports.append)
    assert [row["epoch"] for row in reports] == [1, 2] and 0 <= reports[0]["top1"] <= 1
    assert first.record["train_images"] == 16 and first.record["epochs"] == 2 and first.record["teacher"] is False
    assert first.record["train_seconds"] > 0 and len(first.record["curve"]) == 2
    assert not first.model.training and not torch.equal(first.model.head.weight, context.model.head.weight)  # type: ignore[union-attr, arg-type]
    again = trained_model(TRAINING, context, report=reports.append)
    assert len(reports) == 2  # nothing was trained
    for one, other in zip(first.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    names = sorted(path.suffix for path in (tmp_path / "finetuned").iterdir())
    assert names == [".lock", ".safetensors"]  # the checkpoint is gone


def test_other_weights_recipes_or_images_are_other_trainings(context: Any, tmp_path: Path) -> None:
    def digest() -> str:
        return str(finetuned(training, context).record["digest"])

    training = TRAINING
    digests = [digest()]
    training = json.dumps({**json.loads(TRAINING), "seed": 4})
    digests.append(digest())
    training = TRAINING
    context.facts.weights_digest = "v" * 64
    digests.append(digest())
    assert len(set(digests)) == 3 == len(list((tmp_path / "finetuned").glob("*.safetensors")))


@pytest.mark.parametrize("damage", ["cut", "a bit"])
def test_a_damaged_result_is_trained_again(
    damage: str, context: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained_model(TRAINING, context)
    (path,) = (tmp_path / "finetuned").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10  # of the last tensor
    path.write_bytes(content if damage == "a bit" else content[:1000])
    with caplog.at_level(logging.WARNING):
        again = trained_model(TRAINING, context)
    assert "trained again" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), again.parameters(), strict=True))


def test_a_record_tells_what_was_computed_in_and_a_repetition_takes_it(context: Any) -> None:
    done = finetuned(TRAINING, context).record
    assert (done["train_precision"], done["attention"]) == ("float32", "mask")  # these scenes ask for no other
    context.cache /= "elsewhere"
    context.cache.mkdir()
    context.arithmetic = Arithmetic("bfloat16", "fold")  # as a record of a GPU has it
    again = finetuned(TRAINING, context).record
    assert (again["train_precision"], again["attention"]) == ("bfloat16", "mask"), "what a CPU has of it"
    assert again["digest"] == done["digest"]


def test_two_that_ask_at_once_train_once(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    training = trainings.Finetuning

    def counted(*arguments: Any, **options: Any) -> Any:
        begun.append(1)
        return training(*arguments, **options)

    monkeypatch.setattr(trainings, "Finetuning", counted)
    threads = [threading.Thread(target=trained_model, args=(TRAINING, context)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1


def test_a_context_without_a_cache_is_refused(context: Any) -> None:
    context.cache = None
    with pytest.raises(FinetuneError, match="OUT/cache"):
        trained_model(TRAINING, context)


def test_trained_reducers_go_back_into_a_placement(context: Any) -> None:
    done = finetuned(TRAINING, context)
    placement = at([1, 2], ATS(Count(24)))
    assert done.load_reducers(placement) is placement and dict(done.reducers) == {}


def trained_by(context: Any, **settings: Any) -> trainings.Finetuned:
    return finetuned(json.dumps({**json.loads(TRAINING), "stages": [taught.stage([1, 2], **settings)]}), context)


def test_trained_weights_go_into_a_placement_of_any_budget_and_of_fewer_blocks(context: Any) -> None:
    with taught.registered():
        done = trained_by(context)
        assert set(done.reducers) == {f"{at}.scores.{of}.{part}" for at in (1, 2) for of in (1, 2)
                                      for part in ("weight", "bias")}  # fmt: skip
        for blocks in ([1, 2], [2]):
            placement = done.load_reducers(placement_from([{**taught.stage(blocks, budget={"count": 9})}], depth=4))
            own = placement.blocks[2]
            assert isinstance(own, taught.Taught)
            assert torch.equal(own.scores["2"].weight, done.reducers["2.scores.2.weight"])  # type: ignore[arg-type]
        random = placement_from([{"at": [1], "stack": [{"name": "random", "budget": {"count": 9}}]}], depth=4)
        assert done.load_reducers(random) is random, "what has no weights needs none"


def test_weights_that_were_not_trained_are_refused_by_name(context: Any) -> None:
    with taught.registered():
        done, other = trained_by(context), finetuned(TRAINING, context)
        with pytest.raises(FinetuneError, match="taught_for_a_test at block 3 needs the weights 'scores.3.weight'"):
            done.load_reducers(placement_from([taught.stage([3])], depth=4))
        with pytest.raises(FinetuneError, match=r"trained with .* of shape \[1, 24\], and here it has \[2, 24\]"):
            done.load_reducers(placement_from([taught.stage([1, 2], directions=2)], depth=4))
        with pytest.raises(FinetuneError, match="this training has none for them"):
            other.load_reducers(placement_from([taught.stage([1])], depth=4))


def test_saved_weights_are_what_was_trained(context: Any) -> None:
    with taught.registered():
        done = trained_by(context)
        placement = done.load_reducers(placement_from([taught.stage([1, 2])], depth=4))
        first = reduce_tokens(done.model, placement).eval()
        done.save(context.cache / "saved")
        kept = load_file(context.cache / "saved" / "reducers.safetensors")
        again = reduce_tokens(done.model, placement_from([taught.stage([1, 2])], depth=4)).eval()
        images = context.workload.batch(0, 2)
        with torch.inference_mode():
            different = again(images)
            again.reducers.load_state_dict(kept)
            assert torch.equal(again(images), first(images))
        assert different.shape == (2, 10)


def test_the_command_trains_evaluates_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--out", str(tmp_path), "--model", "pairs_vit_tiny", "--limit", "4", "--device", "cpu",
        "--at", "3", "--reducer", '{"name": "topk", "budget": {"count": 16}}',
        "--set", "epochs=1", "images=8", "batch=4", "holdout=0", "distill.tau=2",
    ]  # fmt: skip
    assert command.main(words) == 0
    assert "after  reduced top-1" in capsys.readouterr().out
    log = json.loads((tmp_path / "finetune.json").read_text())
    assert log["recipe"]["distill"] == {"alpha": 0.5, "tau": 2} and log["training"]["teacher"] is True
    assert log["evaluation"]["after"]["reduced"][1] < log["evaluation"]["after"]["dense"][1]
    weights = load_file(tmp_path / "finetuned.safetensors")
    loaded = open_model("pairs_vit_tiny", weights=str(tmp_path / "finetuned.safetensors"), workload_name="embedded")
    assert torch.equal(loaded.model.state_dict()["head.weight"], weights["head.weight"])
    assert not (tmp_path / "reducers.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "3"], "--at and --reducer belong together"),
        (["--set", "lr"], "--set takes NAME=VALUE"),
        (["--set", "speed=1"], "unknown setting 'speed'"),
        (["--stages", "{"], "--stages is JSON"),
        (["--workload", "imagefolder", "--data", "nowhere", "--weights", "random"], "does not exist"),
    ],
)
def test_mistakes_on_the_command_line_are_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_trains_on_an_image_folder(tmp_path: Path, make_folder: Callable[[str, int], Path]) -> None:
    words = [
        "--workload", "imagefolder", "--data", str(make_folder("train", 6).parent), "--out", str(tmp_path / "out"),
        "--model", "test_vit", "--weights", "random", "--device", "cpu", "--workers", "0",
        "--set", "epochs=1", "batch=4", "amp=none", "holdout=2",
    ]  # fmt: skip
    assert make_folder("val", 2).is_dir()
    assert command.main(words) == 0
    log = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert log["training"]["train_images"] == 8 and log["recipe"]["augment"] == "strong"


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str, int], Path]:
    """Folders of two classes of noise."""

    def make(split: str, count: int) -> Path:
        root = tmp_path / "data" / split
        for label, name in enumerate(("cats", "dogs")):
            (root / name).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng([label, number, count]).integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / name / f"{split}{number}.png")
        return root

    return make


def test_a_model_that_is_driven_otherwise_is_trained_anew_and_so_driven(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimmViT, "options", {"fill": ("last", "zero")})
    seen: list[str] = []
    block = TimmViT.block

    def driven(host: TimmViT, index: int) -> HostBlock:
        seen.append(host.chosen["fill"])
        return block(host, index)

    monkeypatch.setattr(TimmViT, "block", driven)
    usual = finetuned(TRAINING, context).record["digest"]
    assert set(seen) == {"last"}
    seen.clear()
    zero = finetuned(TRAINING, context, host=HostOptions.of({"fill": "zero"}))
    assert "zero" in seen and zero.record["digest"] != usual
