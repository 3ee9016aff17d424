"""What a training computes in: asked of the device, told in its record, and taken as recorded when it is repeated."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path

import pytest
import torch

from ablations import precision
from ablations.measure import attention
from ablations.measure.attention import Shape, attention_for, in_turn, measured, quicker
from ablations.measure.finetune.loop import Finetuning
from ablations.precision import Arithmetic, autocast, features_in, half_of, has_bfloat16, in_words, precision_on
from ablations.run.reproduce import recorded_arithmetic
from ablations.workloads import train_embedded
from reducers.hosts import host_of
from reducers.hosts.protocol import Host

from .conftest import ATS, CPU, plain_model, recipe_of, scenes, training

GPU = torch.device("cuda")
CPUINFO = "processor : 0\nflags\t\t: fpu sse2 avx512f {}\nprocessor : 1\nflags\t\t: fpu\n"


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The CPU says that it can do this."""
    monkeypatch.setattr(precision, "_cpu_features", lambda: features_in(CPUINFO.format(request.param)))
    return str(request.param)


@pytest.mark.parametrize(
    ("units", "there"), [("avx512_bf16", True), ("amx_bf16 amx_tile", True), ("amx_tile", False), ("", False)],
    indirect=["units"],
)  # fmt: skip
def test_a_cpu_is_asked_for_its_units_before_anything_is_cast(units: str, there: bool) -> None:
    assert has_bfloat16(CPU) is there
    assert precision_on(CPU, "bfloat16") == half_of(CPU) == ("bfloat16" if there else "float32")
    assert precision_on(CPU, "float16") == "float16" and precision_on(CPU, "float32") == "float32"
    x = torch.randn(2, 3)
    with autocast(CPU, precision_on(CPU, "bfloat16")):
        assert (x @ x.T).dtype == (torch.bfloat16 if there else torch.float32)


def test_a_gpu_is_asked_whether_it_has_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, there=there: there)
        assert has_bfloat16(GPU) is there and half_of(GPU) == ("bfloat16" if there else "float16")


def test_features_are_read_as_linux_lists_them_on_x86_and_on_arm() -> None:
    assert features_in(CPUINFO.format("amx_bf16")) == {"fpu", "sse2", "avx512f", "amx_bf16"}
    assert features_in("BogoMIPS : 2\nFeatures\t: fp asimd bf16 i8mm\n") == {"fp", "asimd", "bf16", "i8mm"}
    assert features_in("") == frozenset()


def test_what_is_computed_in_is_said_and_why() -> None:
    assert in_words(CPU, "bfloat16", wanted="bfloat16") == "computed in bfloat16"
    told = in_words(CPU, "float32", wanted="bfloat16")
    assert told.startswith("computed in float32: this ") and "has no units for bfloat16" in told


@pytest.mark.parametrize(("units", "there"), [("amx_bf16", True), ("", False)], indirect=["units"])
def test_a_training_computes_in_what_its_device_has_and_says_so(
    units: str, there: bool, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[torch.dtype] = []
    begun = training(cache, recipe_of(stages=[ATS], amp="bfloat16", images=8), model=plain_model())
    begun.model.base.head.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    with caplog.at_level(logging.INFO):
        begun.run()
    assert begun.arithmetic == Arithmetic("bfloat16" if there else "float32")
    assert set(seen) == {torch.bfloat16 if there else torch.float32}
    assert f"computed in {begun.arithmetic.precision}" in caplog.text


def test_what_a_record_says_is_computed_in_wherever_it_is_repeated(cache: Path) -> None:
    recipe = recipe_of(stages=[ATS], amp="bfloat16", images=8)
    found = {}
    for kind in ("float32", "bfloat16"):
        begun = Finetuning(
            recipe, plain_model(), scenes(cache, recipe), device=CPU, arithmetic=Arithmetic(kind, "fold")  # type: ignore[arg-type]
        )  # fmt: skip
        begun.run()
        assert begun.model.attention == "fold" and begun.attention == "mask", "a CPU has nothing to choose"
        found[kind] = begun.trained()[0]["head.weight"]
    assert not torch.equal(found["float32"], found["bfloat16"])


def test_a_training_goes_on_in_what_it_began_in(cache: Path) -> None:
    recipe = recipe_of(amp="bfloat16", images=8)
    begun, other = (
        Finetuning(recipe, plain_model(), scenes(cache, recipe), device=CPU, arithmetic=chosen)
        for chosen in (Arithmetic("bfloat16", "fold"), Arithmetic("float32", "mask"))
    )
    other.restore(begun.state())
    assert other.arithmetic == Arithmetic("bfloat16", "fold") and other.model.attention == "fold"


def test_rows_name_it_and_older_ones_do_not() -> None:
    assert recorded_arithmetic({"train_precision": None, "attention": "mask"}) is None
    assert recorded_arithmetic({}) is None
    row = {"train_precision": "bfloat16", "attention": "fold"}
    assert recorded_arithmetic(row) == Arithmetic("bfloat16", "fold")
    assert recorded_arithmetic({**row, "attention": None}) == Arithmetic("bfloat16", "mask")


@pytest.mark.parametrize(("units", "there"), [("amx_bf16", True), ("", False)], indirect=["units"])
def test_the_weights_of_the_embedded_models_are_trained_in_what_there_is(
    units: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_embedded, "BATCH", 4)
    monkeypatch.setattr(train_embedded, "EVALUATED", 4)
    with caplog.at_level(logging.INFO):
        train_embedded.train("digits_vit_tiny", 4, tmp_path, stop_after=4)
    record = json.loads((tmp_path / "digits_vit_tiny.training.json").read_text())
    assert record["precision"] == ("bfloat16" if there else "float32")
    assert f"computed in {record['precision']}" in caplog.text


# --- the way sizes come into attention --------------------------------------------------------------------------------


SHAPE = Shape(images=2, tokens=5, heads=2, width=8)


def test_where_there_is_nothing_to_choose_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "measured", lambda *asked, **more: pytest.fail("measured"))
    assert attention_for(SHAPE, "bfloat16", device=CPU, folder=tmp_path) == "mask"
    assert attention_for(SHAPE, "float32", device=GPU, folder=tmp_path) == "mask"
    assert not list(tmp_path.iterdir())


def test_it_is_measured_once_a_run_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement is asked of a device that is not here: what it finds is given, what is made of it is not."""
    asked: list[tuple[Shape, torch.dtype]] = []
    seconds = {"mask": 2.0, "fold": 1.0}

    def measured_there(shape: Shape, dtype: torch.dtype, **more: object) -> dict[str, float]:
        asked.append((shape, dtype))
        return seconds

    monkeypatch.setattr(attention, "device_name", lambda device: "a GPU / 80 GB")
    monkeypatch.setattr(attention, "measured", measured_there)
    for _ in range(2):
        assert attention_for(SHAPE, "bfloat16", device=GPU, folder=tmp_path) == "fold"
    assert asked == [(SHAPE, torch.bfloat16)], "the second one reads what the first found"
    seconds.update(mask=0.5)
    other = dataclasses.replace(SHAPE, tokens=6)
    assert attention_for(other, "bfloat16", device=GPU, folder=tmp_path) == "mask"
    (file,) = tmp_path.glob("attention-a-GPU---80-GB-bfloat16-2-5-*.json")
    file.write_text("{")
    assert attention_for(SHAPE, "bfloat16", device=GPU, folder=tmp_path) == "mask", "a spoilt file is made anew"


def test_the_quicker_one_is_taken_and_the_mask_where_neither_is() -> None:
    assert quicker({"mask": 1.0, "fold": 0.9}) == "fold"
    assert quicker({"mask": 1.0, "fold": 1.0}) == quicker({"mask": 1.0, "fold": 1.1}) == "mask"


def test_the_two_take_turns() -> None:
    calls: list[str] = []
    times = in_turn({"a": lambda: calls.append("a"), "b": lambda: time.sleep(0.002)}, CPU, rounds=4)
    assert len(calls) == 4 + attention.WARMUP and [len(times[name]) for name in "ab"] == [4, 4]
    assert min(times["b"]) >= 0.002 > min(times["a"])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_what_is_measured_is_attention_with_sizes(backward: bool) -> None:
    seconds = measured(SHAPE, torch.float32, device=CPU, backward=backward, rounds=1)
    assert set(seconds) == {"mask", "fold"} and all(own > 0 for own in seconds.values())
    assert Shape.of(training_host(), 7) == Shape(7, 65, 2, 12)


def training_host() -> Host:
    return host_of(plain_model())
